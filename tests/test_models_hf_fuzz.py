"""Decoders against `transformers`, where it is installed: random hyper-parameters of odd sizes.

A seed draws the settings; matrices, norms and biases are random, so that a setting read wrongly
moves the logits by far more than the tolerance.
"""

import copy
import json

import golden_hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.hf import family as family_lib
from models.hf import tree
from models.hf.settings import ACTIVATIONS, Settings
from partitioning import mesh as mesh_lib
from partitioning import rules as rules_lib
from t5x_like import integrity, state
from t5x_like.interchange import exporting, folder

pytestmark = pytest.mark.slow
SEEDS = range(3)
_LENGTH = 20


class Draw:
  """Settings drawn one after the other."""

  def __init__(self, *seed: int):
    self.random = np.random.default_rng(seed)

  def of(self, *options):
    """One of them."""
    return options[self.random.integers(len(options))]

  def chance(self, share: float = 0.5) -> bool:
    """True as often as this."""
    return bool(self.random.random() < share)

  def activation(self) -> str:
    """A name that config.json may give it."""
    return self.of(*sorted(ACTIVATIONS))

  def rotation(self, *kinds: str, fraction: float = 1.0) -> dict:
    """`rope_parameters` of one of the kinds."""
    kind = self.of('default', *kinds)
    out = {'rope_type': kind, 'rope_theta': self.of(100.0, 777.5, 5e5)}
    if fraction != 1:
      out['partial_rotary_factor'] = fraction
    if kind != 'default':
      out['factor'] = self.of(2.0, 3.5)
    if kind in ('yarn', 'llama3'):
      out['original_max_position_embeddings'] = self.of(4, 7, 16)
    if kind == 'yarn':
      out |= {'beta_slow': self.of(0.5, 2.0), 'truncate': self.chance()}
    if kind == 'llama3':
      out |= {'low_freq_factor': 1.5, 'high_freq_factor': 3.0}
    return out


def _gpt2(d: Draw) -> dict:
  heads = d.of(1, 3, 5)
  return {'vocab_size': d.of(53, 71), 'n_positions': 23, 'n_embd': heads * d.of(4, 5, 7),
          'n_layer': d.of(1, 3), 'n_head': heads, 'n_inner': d.of(None, 13),
          'activation_function': d.activation(), 'layer_norm_epsilon': d.of(1e-2, 1e-6),
          'scale_attn_weights': d.chance(), 'scale_attn_by_inverse_layer_idx': d.chance(),
          'reorder_and_upcast_attn': d.chance(), 'tie_word_embeddings': d.chance(),
          'attn_pdrop': 0.3, 'eos_token_id': [2, 7], 'bos_token_id': 1}


def _gptj(d: Draw) -> dict:
  heads = d.of(1, 3, 5)
  return {'vocab_size': 53, 'n_positions': 23, 'n_embd': heads * d.of(6, 10), 'n_layer': d.of(1, 2),
          'n_head': heads, 'rotary_dim': d.of(2, 4, 6), 'n_inner': d.of(None, 13),
          'activation_function': d.activation(), 'layer_norm_epsilon': d.of(1e-2, 1e-6),
          'tie_word_embeddings': d.chance(), 'eos_token_id': 2, 'bos_token_id': 1}


def _neox(d: Draw) -> dict:
  heads = d.of(1, 3, 5)
  return {'vocab_size': d.of(53, 71), 'hidden_size': heads * d.of(10, 12),
          'num_hidden_layers': d.of(1, 2), 'num_attention_heads': heads, 'intermediate_size': 13,
          'hidden_act': d.activation(), 'layer_norm_eps': d.of(1e-2, 1e-6),
          'max_position_embeddings': d.of(16, 40), 'use_parallel_residual': d.chance(),
          'attention_bias': d.chance(), 'tie_word_embeddings': d.chance(),
          'rope_parameters': d.rotation('linear', fraction=d.of(0.25, 0.3, 0.6))}


def _mpt(d: Draw) -> dict:
  heads = d.of(1, 3, 5, 6, 7, 12)
  return {'d_model': heads * d.of(3, 5, 8), 'n_heads': heads, 'n_layers': d.of(1, 2),
          'vocab_size': 53, 'max_seq_len': 37, 'layer_norm_epsilon': d.of(1e-2, 1e-6),
          'tie_word_embeddings': d.chance(), 'attn_config': {
              'clip_qkv': d.of(None, 0.3, 6.0), 'softmax_scale': d.of(None, 0.9),
              'alibi_bias_max': d.of(8, 11)}}


def _falcon(d: Draw) -> dict:
  heads, kind = d.of(2, 3, 6, 9), d.of(
      {'multi_query': True}, {'new_decoder_architecture': True, 'num_kv_heads': 1},
      {'new_decoder_architecture': True, 'num_ln_in_parallel_attn': 1},
      {'alibi': True, 'multi_query': False, 'parallel_attn': False, 'bias': True},
      {'multi_query': False, 'parallel_attn': False})
  return {'vocab_size': 53, 'hidden_size': heads * d.of(4, 6), 'num_hidden_layers': d.of(1, 2),
          'num_attention_heads': heads, 'layer_norm_epsilon': d.of(1e-2, 1e-6),
          'ffn_hidden_size': d.of(None, 13), 'activation': d.activation(), 'bias': d.chance(),
          'tie_word_embeddings': d.chance(), 'max_position_embeddings': 16,
          'rope_parameters': d.rotation('linear', 'dynamic', 'yarn', 'llama3'),
          'eos_token_id': 2, 'bos_token_id': 1, **kind}


def _llama(d: Draw, **more) -> dict:
  heads = d.of(2, 3, 6)
  return {'vocab_size': d.of(53, 71), 'hidden_size': heads * d.of(4, 6, 10),
          'intermediate_size': d.of(13, 31), 'num_hidden_layers': d.of(1, 3),
          'num_attention_heads': heads, 'num_key_value_heads': d.of(1, heads),
          'head_dim': d.of(4, 6, 10), 'hidden_act': d.activation(),
          'max_position_embeddings': d.of(16, 40), 'rms_norm_eps': d.of(1e-2, 1e-6),
          'tie_word_embeddings': d.chance(), 'pad_token_id': d.of(None, 0), 'eos_token_id': 2,
          'rope_parameters': d.rotation('linear', 'dynamic', 'yarn', 'llama3'), **more}


def _qwen(d: Draw, **more) -> dict:
  return _llama(d, use_sliding_window=d.chance(0.7), sliding_window=d.of(3, 100),
                max_window_layers=d.of(0, 1, 9), **more)


def _gemma(d: Draw, **more) -> dict:
  out = _llama(d, query_pre_attn_scalar=d.of(7, 144), sliding_window=d.of(3, 100),
               attention_bias=d.chance(), final_logit_softcapping=d.of(None, 3.0),
               attn_logit_softcapping=d.of(None, 2.0), bos_token_id=1, **more)
  return {**out, 'hidden_activation': out.pop('hidden_act')}


def _phi3(d: Draw) -> dict:
  out, fraction, first = _llama(d), d.of(1.0, 0.5), d.of(8, 32)
  out.pop('head_dim')
  out['hidden_size'] = 8 * out['num_attention_heads']
  rotation = d.rotation(fraction=fraction)
  if d.chance():
    factors = [d.random.uniform(1, 9, int(4 * fraction)).round(3).tolist() for _ in range(2)]
    rotation |= {'rope_type': 'longrope', 'short_factor': factors[0], 'long_factor': factors[1]}
  return out | {'pad_token_id': 0, 'sliding_window': d.of(None, 5), 'rope_parameters': rotation,
                'original_max_position_embeddings': first, 'bos_token_id': 1,
                'max_position_embeddings': d.of(1, 4) * first}


def _bark(d: Draw) -> dict:
  heads = d.of(1, 3)
  return {'block_size': 23, 'input_vocab_size': 53, 'output_vocab_size': 61,
          'num_layers': d.of(1, 2), 'num_heads': heads, 'hidden_size': heads * d.of(5, 6),
          'bias': d.chance()}


FAMILIES = {
    'GPT2': _gpt2, 'GPTJ': _gptj, 'GPTNeoX': _neox, 'Mpt': _mpt, 'Falcon': _falcon, 'Bark': _bark,
    'Llama': lambda d: _llama(d, attention_bias=d.chance(), mlp_bias=d.chance()),
    'Mistral': lambda d: _llama(d, sliding_window=d.of(None, 1, 5, 100)),
    'Mixtral': lambda d: _llama(d, sliding_window=d.of(None, 5), num_local_experts=3,
                                num_experts_per_tok=d.of(1, 2)),
    'Qwen2': _qwen, 'Qwen3': lambda d: _qwen(d, attention_bias=d.chance()),
    'Gemma2': lambda d: _gemma(d) | {'rope_parameters': d.rotation('linear')},
    'Gemma3': lambda d: _gemma(d) | {'rope_parameters': {
        'full_attention': d.rotation('linear', 'yarn'), 'sliding_attention': d.rotation('linear')}},
    'Olmo2': lambda d: _llama(d, attention_bias=d.chance()), 'Phi3': _phi3,
}
_CLASSES = {'GPT2': ('GPT2Config', 'GPT2LMHeadModel'), 'Gemma3': ('Gemma3TextConfig',
            'Gemma3ForCausalLM'), 'Bark': ('BarkSemanticConfig', 'BarkSemanticModel')}
CASES = [(name, seed) for name in FAMILIES for seed in SEEDS]


def _classes(name: str):
  transformers = pytest.importorskip('transformers')
  return [getattr(transformers, one) for one in _CLASSES.get(
      name, (f'{name}Config', f'{name}ForCausalLM'))]


def _eager(name: str) -> dict:
  more = {'experts_implementation': 'eager'} if name == 'Mixtral' else {}
  return {'attn_implementation': 'eager', **more}


def _model(name: str, seed: int):
  """A random model of theirs."""
  torch = pytest.importorskip('torch')
  config, kind = _classes(name)
  torch.manual_seed(seed)
  model = kind._from_config(config(**FAMILIES[name](Draw(seed, 5))), **_eager(name)).eval()
  with torch.no_grad():
    for path, value in model.named_parameters():
      value.normal_(0, 0.3)
      # Gemma stores its scales less one.
      if value.ndim == 1 and path.endswith('weight') and not name.startswith('Gemma'):
        value.add_(1)
  model.tie_weights()
  return model


def _theirs(model, ids, mask=None, positions=None):
  torch = pytest.importorskip('torch')
  given = {} if mask is None else {'attention_mask': mask, 'position_ids': positions}
  if type(model).__name__.startswith('Mpt'):
    given.pop('position_ids', None)
  with torch.no_grad():
    return model(**{key: torch.tensor(value.astype(np.int64)) for key, value in
                    {'input_ids': ids, **given}.items()}, use_cache=False).logits.numpy()


@pytest.mark.parametrize('name, seed', CASES)
def test_logits_and_exports_are_the_reference_s(name, seed, tmp_path):
  model = _model(name, seed)
  model.save_pretrained(tmp_path / 'theirs')
  found = folder.load(str(tmp_path / 'theirs'))
  config = golden_hf.in_float32(found.config, layer_loop=('scan', 'unroll')[seed % 2])
  made = state.describe(found.family.model(config=config), mesh_lib.make_mesh(devices=1),
                        rules_lib.data_parallel())
  leaves = golden_hf.leaves(made)
  flat = tree.from_tensors(found.family, config, leaves, found.stored)
  params = jax.tree.map(jnp.asarray, integrity.nest(flat))
  ids = np.random.default_rng(seed).integers(3, config.vocab, (2, _LENGTH)).astype(np.int32)
  mask = np.ones_like(ids)
  mask[1, :4] = 0
  places = np.maximum(mask.cumsum(1) - 1, 0).astype(np.int32)

  def run(params):
    module = made.module(params)
    return module(ids), module(ids, positions=places, segment_ids=mask)

  with jax.set_mesh(made.mesh), rules_lib.use(made.rules):
    plain, padded = jax.jit(run, compiler_options={'xla_backend_optimization_level': 0})(params)
  wanted = _theirs(model, ids)
  golden_hf.close(plain, wanted, 'plain')
  golden_hf.close(np.asarray(padded) * mask[..., None],
                  _theirs(model, ids, mask, places) * mask[..., None], 'padded')
  written = dict(tree.to_tensors(found.family, config, leaves, lambda path, i: flat[path][i]))
  assert written.keys() == found.stored.keys()
  assert all(value.tobytes() == found.stored[key].read().tobytes()
             for key, value in written.items())
  values = exporting.settings(exporting.choose(config, None, found.values['model_type']), config,
                              found.values, dtype='F32', spelling='current')
  (tmp_path / 'theirs/config.json').write_text(json.dumps(values))
  again = type(model).from_pretrained(tmp_path / 'theirs', **_eager(name)).eval()
  np.testing.assert_allclose(_theirs(again, ids), wanted, atol=1e-5)


@pytest.mark.parametrize('name, seed', CASES)
def test_a_setting_left_out_or_null_means_what_the_reference_means(name, seed):
  kind, _ = _classes(name)

  def ours(values):
    settings = Settings(copy.deepcopy(values))
    try:
      return family_lib.structure(family_lib.of_settings(settings.values).read(settings))
    except ValueError:
      return None

  said = json.loads(kind(**FAMILIES[name](Draw(seed, 5))).to_json_string())
  for key in said.keys() - {'model_type', 'architectures', 'transformers_version'}:
    without = {k: v for k, v in said.items() if k != key}
    for changed in (without, {**without, key: None}):
      try:
        full = kind(**{k: v for k, v in copy.deepcopy(changed).items() if k != 'model_type'})
      except Exception:  # Theirs refuses it in ways of its own.
        continue
      assert ours(changed) == ours(json.loads(full.to_json_string())), key
