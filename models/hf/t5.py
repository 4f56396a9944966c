"""T5 1.0 (arXiv:1910.10683), 1.1 and their descendants (mT5, FLAN-T5)."""

import dataclasses
from typing import Any

from models.config import DecoderConfig
from models.encdec import EncDecConfig, EncDecLM
from models.hf import names
from models.hf.family import Family, structure
from models.hf.settings import ACTIVATIONS, Settings
from models.hf.table import Row, row

# 'gated-gelu' has always meant the approximation.
_GATED: dict[str, Any] = {'gated-gelu': 'gelu_tanh', 'gated-gelu_new': 'gelu_tanh',
                          'gated-relu': 'relu', 'gated-silu': 'silu'}


def _read(c: Settings) -> EncDecConfig:
  c.only('is_encoder_decoder', True, default=True)
  form = c.get('feed_forward_proj', default='relu')
  activation = _GATED.get(form, ACTIVATIONS.get(form))
  if activation is None:
    raise ValueError(f'{c.where}: feed_forward_proj={form!r} is not supported; supported: '
                     f'{", ".join(sorted({*_GATED, *ACTIVATIONS}))}')
  # Derived from feed_forward_proj; and a limit that relative positions do not have.
  for name in ('dense_act_fn', 'is_gated_act', 'n_positions', 'output_past'):
    c.get(name, default=None)
  embed, count = c.get('d_model'), c.get('num_layers')
  tied = c.embeddings(default=True)
  encoder = DecoderConfig(
      vocab=c.get('vocab_size'), embed=embed, layers=count, heads=c.get('num_heads'),
      head_dim=c.get('d_kv'), mlp=c.get('d_ff'), activation=activation,
      mlp_form='gated' if form in _GATED else 'plain', attention_scale=1.0, position='relative',
      norm_eps=c.get('layer_norm_epsilon', default=1e-6), embeddings=tied,
      relative_buckets=c.get('relative_attention_num_buckets', default=32),
      relative_distance=c.get('relative_attention_max_distance', default=128))
  decoder = dataclasses.replace(encoder, layers=c.get('num_decoder_layers', default=count))
  return EncDecConfig(encoder=encoder, decoder=decoder,
                      output_scale=embed**-0.5 if tied == 'tied' else 1.0)


def _write(config: EncDecConfig) -> dict[str, Any]:
  stack = config.decoder
  tied = stack.embeddings == 'tied'
  names.require(stack, 't5', position='relative', attention_scale=1.0, norm='rmsnorm',
                norms='pre', biases=(), embed_scale=1.0)
  if config.output_scale != (stack.embed**-0.5 if tied else 1.0):
    raise ValueError(f't5 scales tied outputs by embed ** -0.5 and no others, but the '
                     f'configuration has output_scale={config.output_scale}')
  same = dataclasses.replace(config.encoder, layers=stack.layers)
  if structure(same) != structure(stack):
    raise ValueError('t5 has an encoder and a decoder of the same settings but their layers')
  # A later spelling of the same activation does not replace the first.
  forms = ({ours: theirs for theirs, ours in reversed(_GATED.items())}
           if stack.mlp_form == 'gated' else names.ACTIVATIONS)
  if stack.activation not in forms:
    raise ValueError(f't5 has no gated {stack.activation!r}; it has {", ".join(forms)}')
  return {'vocab_size': stack.vocab, 'd_model': stack.embed, 'd_kv': stack.width_of_head,
          'd_ff': stack.mlp, 'num_layers': config.encoder.layers,
          'num_decoder_layers': stack.layers, 'num_heads': stack.heads,
          'feed_forward_proj': forms[stack.activation], 'layer_norm_epsilon': stack.norm_eps,
          'relative_attention_num_buckets': stack.relative_buckets,
          'relative_attention_max_distance': stack.relative_distance,
          'is_encoder_decoder': True, 'tie_word_embeddings': tied}


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
    write=_write, rows=_rows, model=EncDecLM,
    # The first files hold a bias for reading the encoder, which was never used.
    ignored=(r'EncDecAttention\.relative_attention_bias\.weight$',)),)
