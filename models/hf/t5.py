"""T5 1.0 (arXiv:1910.10683), 1.1 and their descendants (mT5, FLAN-T5)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from models.config import DecoderConfig
from models.encdec import EncDecConfig, EncDecLM
from models.hf import names
from models.hf.family import Family, structure
from models.hf.files import Stored
from models.hf.settings import ACTIVATIONS, Settings
from models.hf.table import Row, row

# What the files of a model type leave out.
_T5 = {'vocab_size': 32128, 'd_ff': 2048, 'num_layers': 6, 'num_heads': 8,
       'feed_forward_proj': 'relu'}
_MT5 = {'vocab_size': 250112, 'd_ff': 1024, 'num_layers': 8, 'num_heads': 6,
        'feed_forward_proj': 'gated-gelu'}


def _scaled(values: Mapping[str, Any]) -> bool:
  """Whether the decoder's states are multiplied by embed ** -0.5.

  T5 1.0's are; 1.1 is told by having no tied head. transformers 5 ties both and writes down which
  it was. mT5 descends from 1.1.
  """
  given = values.get('scale_decoder_outputs')
  given = values.get('tie_word_embeddings') is not False if given is None else given
  return bool(given) and values.get('model_type') != 'mt5'


def _settle(values: Mapping[str, Any], stored: Mapping[str, Stored]) -> dict[str, Any]:
  """A head in the file is one of its own, whatever the settings say: as transformers 5 does."""
  own, tied = 'lm_head.weight' in stored, values.get('tie_word_embeddings') is not False
  if own != tied:
    return {}
  if own and 'shared.weight' in stored and np.array_equal(
      stored['lm_head.weight'].read(), stored['shared.weight'].read()):
    return {}
  return {'tie_word_embeddings': not own, 'scale_decoder_outputs': _scaled(values)}


def _form(c: Settings, default: str) -> tuple[Any, Any]:
  """Activation and form of the MLP."""
  form = c.get('feed_forward_proj', default=default)
  # 'gated-gelu' has always meant the approximation.
  theirs = 'gelu_new' if form == 'gated-gelu' else form.removeprefix('gated-')
  # Derived from it, but where a file has them too, they are what counts.
  theirs = c.get('dense_act_fn', default=theirs)
  gated = c.get('is_gated_act', default=form.startswith('gated-'))
  if theirs not in ACTIVATIONS:
    raise ValueError(f'{c.where}: feed_forward_proj={form!r} with activation {theirs!r} is not '
                     f"supported; supported, each with and without 'gated-': "
                     f'{", ".join(sorted(ACTIVATIONS))}')
  return ACTIVATIONS[theirs], 'gated' if gated else 'plain'


def _read(c: Settings) -> EncDecConfig:
  c.only('is_encoder_decoder', True, default=True)
  usual = _MT5 if c.values.get('model_type') == 'mt5' else _T5
  activation, form = _form(c, usual['feed_forward_proj'])
  # A limit that relative positions do not have; and what `_scaled` reads.
  for name in ('n_positions', 'output_past', 'scale_decoder_outputs'):
    c.get(name, default=None)
  embed = c.get('d_model', 'hidden_size', default=512)
  count = c.get('num_layers', 'num_hidden_layers', default=usual['num_layers'])
  encoder = DecoderConfig(
      vocab=c.get('vocab_size', default=usual['vocab_size']), embed=embed, layers=count,
      heads=c.get('num_heads', 'num_attention_heads', default=usual['num_heads']),
      head_dim=c.get('d_kv', 'head_dim', default=64), mlp=c.get('d_ff', default=usual['d_ff']),
      activation=activation, mlp_form=form, attention_scale=1.0, position='relative',
      norm_eps=c.get('layer_norm_epsilon', default=1e-6), embeddings=c.embeddings(default=True),
      relative_buckets=c.get('relative_attention_num_buckets', default=32),
      relative_distance=c.get('relative_attention_max_distance', default=128))
  decoder = dataclasses.replace(encoder, layers=c.get('num_decoder_layers', default=count))
  return EncDecConfig(encoder=encoder, decoder=decoder,
                      output_scale=embed**-0.5 if _scaled(c.values) else 1.0)


def _write(config: EncDecConfig) -> dict[str, Any]:
  stack = config.decoder
  tied = stack.embeddings == 'tied'
  names.require(stack, 't5', position='relative', attention_scale=1.0, norm='rmsnorm',
                norms='pre', biases=(), embed_scale=1.0)
  if config.output_scale not in (1.0, stack.embed**-0.5):
    raise ValueError(f't5 scales outputs by embed ** -0.5 or not at all, but the configuration has '
                     f'output_scale={config.output_scale}')
  same = dataclasses.replace(config.encoder, layers=stack.layers)
  if structure(same) != structure(stack):
    raise ValueError('t5 has an encoder and a decoder of the same settings but their layers')
  form = names.ACTIVATIONS[stack.activation]
  if stack.mlp_form == 'gated':
    form = 'gated-' + {'gelu': 'gelu_python', 'gelu_new': 'gelu'}.get(form, form)
  return {'vocab_size': stack.vocab, 'd_model': stack.embed, 'd_kv': stack.width_of_head,
          'd_ff': stack.mlp, 'num_layers': config.encoder.layers,
          'num_decoder_layers': stack.layers, 'num_heads': stack.heads,
          'feed_forward_proj': form, 'layer_norm_epsilon': stack.norm_eps,
          'relative_attention_num_buckets': stack.relative_buckets,
          'relative_attention_max_distance': stack.relative_distance,
          'is_encoder_decoder': True, 'tie_word_embeddings': tied,
          'scale_decoder_outputs': config.output_scale != 1.0}


def _older(values: dict[str, Any]) -> dict[str, Any]:
  scaled, tied = values['scale_decoder_outputs'], values['tie_word_embeddings']
  if scaled != tied:
    raise ValueError(f'transformers 4 scales the outputs of a t5 whose head is tied and of no '
                     f'other, but this one has tie_word_embeddings={tied} and '
                     f'scale_decoder_outputs={scaled}; write it with --spelling=current')
  return {name: value for name, value in values.items() if name != 'scale_decoder_outputs'}


def _attention(theirs: str, ours: str) -> list[Row]:
  return [row(f'{theirs}.q.weight', f'{ours}/query/kernel', '(heads head_dim) embed'),
          row(f'{theirs}.k.weight', f'{ours}/key/kernel', '(kv_heads head_dim) embed'),
          row(f'{theirs}.v.weight', f'{ours}/value/kernel', '(kv_heads head_dim) embed'),
          row(f'{theirs}.o.weight', f'{ours}/out/kernel', 'embed (heads head_dim)')]


def _side(side: str, config: DecoderConfig) -> list[Row]:
  where, ours = f'{side}.block.{{layer}}.layer', f'{side}/layers'
  last = 2 if side == 'decoder' else 1
  dense = f'{where}.{last}.DenseReluDense'
  rows = [
      # One table, stored in the first block.
      row(f'{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight',
          f'{side}/relative/embedding', 'buckets heads'),
      *_attention(f'{where}.0.SelfAttention', f'{ours}/attention'),
      row(f'{where}.0.layer_norm.weight', f'{ours}/norm1/scale', 'norm'),
      row(f'{where}.{last}.layer_norm.weight', f'{ours}/norm2/scale', 'norm'),
      row(f'{dense}.wo.weight', f'{ours}/mlp/down/kernel', 'embed mlp'),
      row(f'{side}.final_layer_norm.weight', f'{side}/norm/scale', 'norm')]
  if side == 'decoder':
    rows += [*_attention(f'{where}.1.EncDecAttention', f'{ours}/cross'),
             row(f'{where}.1.layer_norm.weight', f'{ours}/cross_norm/scale', 'norm')]
  ins = {'wi_0': 'gate', 'wi_1': 'up'} if config.mlp_form == 'gated' else {'wi': 'up'}
  return rows + [row(f'{dense}.{name}.weight', f'{ours}/mlp/{part}/kernel', 'mlp embed')
                 for name, part in ins.items()]


def _rows(config: EncDecConfig) -> list[Row]:
  return [row('shared.weight', 'embed/embedding', 'vocab embed'),
          *_side('encoder', config.encoder), *_side('decoder', config.decoder),
          *names.head('lm_head', config.decoder)]


FAMILIES = (Family(
    name='t5', model_types=('t5', 'mt5'), architecture='T5ForConditionalGeneration', read=_read,
    write=_write, rows=_rows, model=EncDecLM, older=_older, settle=_settle,
    architectures={'mt5': 'MT5ForConditionalGeneration'},
    # The first files hold a bias for reading the encoder, which was never used.
    ignored=(r'EncDecAttention\.relative_attention_bias\.weight$',)),)
