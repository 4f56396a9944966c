"""GPT-J (Wang & Komatsuzaki 2021): parallel blocks, neighbours rotated, a head with a bias."""

import math
from typing import Any

from models.config import DecoderConfig
from models.decoder import DecoderLM
from models.hf import names
from models.hf.family import Family
from models.hf.settings import Settings
from models.hf.table import Row, row


def _read(c: Settings) -> DecoderConfig:
  c.assume(vocab_size=50400, n_embd=4096, n_layer=28, n_head=16, n_positions=2048, rotary_dim=64)
  # Of the published file; the reference always scales.
  c.only('scale_attn_weights', True, default=True)
  embed, heads = c.get('n_embd', 'hidden_size'), c.get('n_head', 'num_attention_heads')
  width = embed // heads
  rotary = c.get('rotary_dim', default=None) or width
  fraction = rotary / width
  # A fraction of two integers times its denominator may fall short of the numerator by a bit.
  fraction = fraction if int(width * fraction) == rotary else math.nextafter(fraction, 2)
  return DecoderConfig(
      vocab=c.get('vocab_size'), embed=embed, heads=heads,
      layers=c.get('n_layer', 'num_hidden_layers'),
      mlp=c.get('n_inner', default=4 * embed), mlp_form='plain', norm='layernorm',
      activation=c.activation('activation_function', default='gelu_new'), block='parallel',
      norm_eps=c.get('layer_norm_epsilon', default=1e-5),
      max_length=c.get('n_positions', 'max_position_embeddings'),
      rope_fraction=fraction, rope_layout='neighbours',
      embeddings=c.embeddings(default=False), biases=('mlp', 'norm', 'head'))


def _write(config: DecoderConfig) -> dict[str, Any]:
  names.require(config, 'gptj', block='parallel', rope_layout='neighbours', mlp_form='plain')
  return {'vocab_size': config.vocab, 'n_embd': config.embed, 'n_layer': config.layers,
          'n_head': config.heads, 'n_inner': config.mlp, 'n_positions': config.max_length,
          'rotary_dim': config.rotary_dim, 'layer_norm_epsilon': config.norm_eps,
          'activation_function': names.ACTIVATIONS[config.activation],
          'tie_word_embeddings': config.embeddings == 'tied'}


def _rows(config: DecoderConfig) -> list[Row]:
  where = 'transformer.h.{layer}'
  return [row('transformer.wte.weight', 'embed/embedding', 'vocab embed'),
          *names.norm(f'{where}.ln_1', 'layers/norm1', config),
          *names.attention(f'{where}.attn', config, out='out_proj'),
          *names.plain(f'{where}.mlp.fc_in', f'{where}.mlp.fc_out', config),
          *names.norm('transformer.ln_f', 'norm', config), *names.head('lm_head', config)]


FAMILIES = (Family(
    name='gptj', model_types=('gptj',), architecture='GPTJForCausalLM', read=_read, write=_write,
    rows=_rows, model=DecoderLM, ignored=(r'\.attn\.(masked_)?bias$',
                                          r'\.attn\.embed_positions$')),)
