"""BERT and RoBERTa of other settings: heads, padding, biases, what a file leaves out."""

import dataclasses

import golden_hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import encoder, layers
from models.config import DecoderConfig
from models.hf import table, tree
from models.hf.files import Stored
from models.hf.settings import Settings
from t5x_like import state


def _read(name: str, **changes) -> encoder.EncoderConfig:
  return golden_hf.family(name).read(Settings({**golden_hf.settings(name).values, **changes}))


def test_the_head_of_roberta_has_the_exact_gelu_whatever_its_blocks_have():
  config = _read('roberta_mlm', hidden_act='relu')
  assert (config.stack.activation, config.head_activation) == ('relu', 'gelu')
  assert _read('bert_mlm', hidden_act='relu').head_activation is None
  assert _read('roberta_mlm').head_activation is None
  plain = golden_hf.structure('roberta_mlm')
  made = state.describe(encoder.EncoderLM(config=golden_hf.in_float32(config, layer_loop='unroll')),
                        plain.mesh, plain.rules)

  def both(params, ids):
    module = made.module(params)
    hidden = module.transform(module.encode(ids), ('embed',))
    hidden = module.transform_norm(jax.nn.gelu(hidden, approximate=False))
    return module(ids), module.embed.attend(hidden) + module.head_bias[...].reshape(1, 1, -1)

  found, wanted = jax.jit(both)(golden_hf.params('roberta_mlm', plain),
                                jnp.arange(5, 17, dtype=jnp.int32)[None])
  np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_each_family_writes_the_activation_of_its_own_head_only():
  bert, roberta = golden_hf.family('bert_mlm'), golden_hf.family('roberta_mlm')
  mixed = _read('roberta_mlm', hidden_act='relu')
  assert roberta.read(Settings(roberta.write(mixed))) == mixed
  with pytest.raises(ValueError, match="bert has .* head_activation='gelu'"):
    bert.write(mixed)
  with pytest.raises(ValueError, match="roberta has head_activation='gelu'"):
    roberta.write(dataclasses.replace(mixed, head_activation=None))
  with pytest.raises(ValueError, match="head_activation='gellu'; allowed: gelu"):
    dataclasses.replace(mixed, head_activation='gellu')


def test_padding_on_the_left_moves_no_position_of_roberta():
  io = golden_hf.outputs('roberta_mlm')
  structure = golden_hf.structure('roberta_mlm', layer_loop='unroll')
  turned = lambda key: np.stack([np.roll(row, int((mask == 0).sum()), 0) for row, mask in zip(
      io[f'padded_{key}'], io['padded_attention_mask'], strict=True)])
  mask = turned('attention_mask')
  assert (mask[-1, 0], mask[-1, -1]) == (0, 1)
  run = jax.jit(lambda params, ids, mask: structure.module(params)(ids, segment_ids=mask))
  found = run(golden_hf.params('roberta_mlm', structure), turned('input_ids'), mask)
  golden_hf.close(np.where(mask[..., None], found, 0),
                  np.where(mask[..., None], turned('logits'), 0), 'padded on the left')


@pytest.mark.parametrize('name, vocab, first', [('bert_mlm', 30522, 0), ('roberta_mlm', 50265, 2)])
def test_settings_a_file_leaves_out_have_the_values_of_its_library(name, vocab, first):
  found = golden_hf.family(name).read(Settings({}))
  stack = found.stack
  assert (stack.vocab, stack.embed, stack.layers, stack.heads, stack.mlp, stack.max_length,
          stack.norm_eps, stack.activation, found.types, found.first_position) == (
              vocab, 768, 12, 12, 3072, 512, 1e-12, 'gelu', 2, first)
  assert _read(name, pad_token_id=6).first_position == (7 if first else 0)


@pytest.mark.parametrize('changes, message', [
    ({'is_decoder': True}, 'is_decoder=True is not supported'),
    ({'position_embedding_type': 'relative_key'}, "position_embedding_type='relative_key' is not"),
    ({'hidden_act': 'prelu'}, "activation 'prelu' is not supported"),
])
def test_what_would_compute_something_else_is_refused_by_name(changes, message):
  for name in ('bert_mlm', 'roberta_mlm'):
    with pytest.raises(ValueError, match=message):
      _read(name, **changes)


def test_every_activation_a_file_can_name_is_there():
  x = jnp.linspace(-8, 8, 33)
  for theirs in ('relu2', 'relu6', 'leaky_relu', 'hardswish', 'mish', 'sigmoid', 'tanh', 'linear',
                 'gelu_python', 'gelu_accurate', 'gelu_python_tanh'):
    found = _read('bert_mlm', hidden_act=theirs)
    assert golden_hf.family('bert_mlm').read(Settings(golden_hf.family('bert_mlm').write(
        found))) == found
    assert np.isfinite(layers.ACTIVATIONS[found.stack.activation](x)).all()
  values = {name: float(layers.ACTIVATIONS[name](jnp.float32(-1.5))) for name in (
      'relu2', 'relu6', 'leaky_relu', 'hardswish', 'mish', 'sigmoid', 'tanh', 'linear')}
  wanted = {'relu2': 0.0, 'relu6': 0.0, 'leaky_relu': -0.015, 'hardswish': -0.375,
            'mish': -0.298100, 'sigmoid': 0.182426, 'tanh': -0.905148, 'linear': -1.5}
  assert values == pytest.approx(wanted, abs=1e-5)
  assert float(layers.ACTIVATIONS['relu2'](jnp.float32(3.0))) == 9.0


class _Given(Stored):
  """A tensor that is not in a file."""

  def read(self):
    return np.full(self.shape, self.start, np.float32)


@pytest.mark.parametrize('name, root', [('bert_mlm', 'cls.predictions'),
                                        ('roberta_mlm', 'lm_head')])
def test_the_bias_beside_an_untied_table_is_the_one_that_counts(name, root):
  """Two biases are in a new file, of which the decoder's is added; older files have the other."""
  family, config = golden_hf.family(name), _read(name, tie_word_embeddings=False)
  made = state.describe(family.model(config=config), golden_hf.structure(name).mesh,
                        golden_hf.lenient())
  leaves = golden_hf.leaves(made)
  stored = {place.theirs: _Given('', 'F32', place.shape, 1, 0)
            for place in table.places(family.rows(config), leaves)}
  bias = stored.pop(f'{root}.decoder.bias')
  read = lambda more: tree.from_tensors(family, config, leaves, {**stored, **more})['head/bias'][0]
  assert read({f'{root}.decoder.bias': bias._replace(start=2)}) == 2
  assert read({f'{root}.bias': bias._replace(start=3)}) == 3
  assert read({f'{root}.decoder.bias': bias._replace(start=2),
               f'{root}.bias': bias._replace(start=3)}) == 2


def test_heads_of_an_odd_width_need_no_rotation():
  stack = DecoderConfig(vocab=7, embed=15, layers=1, heads=3, mlp=4, position='learned')
  for position in ('learned', 'alibi', 'relative', 'none'):
    assert dataclasses.replace(stack, position=position).width_of_head == 5
  with pytest.raises(ValueError, match='rotate an even number of the 5'):
    dataclasses.replace(stack, position='rope')
