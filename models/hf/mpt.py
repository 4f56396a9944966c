"""MPT (MosaicML 2023): ALiBi, no biases anywhere, clipped queries, keys and values."""

from typing import Any

from models.config import DecoderConfig
from models.decoder import DecoderLM
from models.hf import names
from models.hf.family import Family
from models.hf.settings import HARMLESS, Settings
from models.hf.table import Row, row

# What transformers' implementation leaves alone, whatever its config.json says.
_IGNORED = ('no_bias', 'norm_type', 'learned_pos_emb')
# Dropout, kernels, and what needs an input that no one gives; a nested config.json has its own.
_HARMLESS = frozenset({'attn_pdrop', 'attn_impl', 'attn_uses_sequence_id'}) | HARMLESS


def _read(c: Settings) -> DecoderConfig:
  c.read.update(_IGNORED)
  c.assume(vocab_size=50368, d_model=2048, n_layers=24, n_heads=16)
  c.only('logit_scale', None, default=None)
  c.only('expansion_ratio', 4, default=4)
  embed = c.get('d_model', 'hidden_size')
  attention = c.inside('attn_config')
  attention.read.update(_HARMLESS)
  attention.only('alibi', True, default=True)
  attention.read.add('alibi_bias_max')  # The reference never reads it.
  attention.only('qk_ln', False, default=False)
  attention.only('prefix_lm', False, default=False)
  attention.only('attn_type', 'multihead_attention', default='multihead_attention')
  return DecoderConfig(
      vocab=c.get('vocab_size'), embed=embed, layers=c.get('n_layers', 'num_hidden_layers'),
      heads=c.get('n_heads', 'num_attention_heads'),
      mlp=4 * embed, mlp_form='plain', activation='gelu', norm='layernorm',
      norm_eps=c.get('layer_norm_epsilon', default=1e-5), position='alibi', alibi_order='mpt',
      max_length=c.get('max_seq_len', default=2048), embeddings=c.embeddings(default=True),
      attention_scale=attention.get('softmax_scale', default=None),
      clip_qkv=attention.get('clip_qkv', default=None) or None)


def _write(config: DecoderConfig) -> dict[str, Any]:
  names.require(config, 'mpt', position='alibi', mlp=4 * config.embed, biases=(),
                alibi_max=8.0, alibi_rounding='none')
  return {'vocab_size': config.vocab, 'd_model': config.embed, 'n_layers': config.layers,
          'n_heads': config.heads, 'expansion_ratio': 4, 'max_seq_len': config.max_length,
          'layer_norm_epsilon': config.norm_eps, 'no_bias': True, 'learned_pos_emb': False,
          'norm_type': 'low_precision_layernorm',
          'tie_word_embeddings': config.embeddings == 'tied',
          'attn_config': {'alibi': True, 'alibi_bias_max': 8, 'attn_impl': 'torch',
                          'attn_type': 'multihead_attention', 'clip_qkv': config.clip_qkv,
                          'prefix_lm': False, 'qk_ln': False,
                          'softmax_scale': config.attention_scale}}


def _rows(config: DecoderConfig) -> list[Row]:
  where, ours = 'transformer.blocks.{layer}', 'layers/attention'
  return [row('transformer.wte.weight', 'embed/embedding', 'vocab embed'),
          *names.joined(f'{where}.attn.Wqkv', config),
          *names.linear(f'{where}.attn.out_proj', f'{ours}/out', 'embed (heads head_dim)',
                         bias=False),
          *names.plain(f'{where}.ffn.up_proj', f'{where}.ffn.down_proj', config),
          *names.norm(f'{where}.norm_1', 'layers/norm1', config),
          *names.norm(f'{where}.norm_2', 'layers/norm2', config),
          *names.norm('transformer.norm_f', 'norm', config), *names.head('lm_head', config)]


FAMILIES = (Family(
    name='mpt', model_types=('mpt',), architecture='MptForCausalLM', read=_read, write=_write,
    rows=_rows, model=DecoderLM),)
