"""Falcon (arXiv:2311.16867): 7B (multi-query), 40B (grouped, two norms), 11B and RW (ALiBi)."""

from typing import Any

from models.config import DecoderConfig
from models.decoder import DecoderLM
from models.hf import names
from models.hf.family import Family
from models.hf.settings import Settings
from models.hf.table import Row, row

# The reference's eager attention adds ALiBi twice, with the mask and again to the scores; its other
# kernels add it once. We follow the eager one; docs/families.md says what that means for users.
_ALIBI_SCALE = 2.0


def _read(c: Settings) -> DecoderConfig:
  c.assume(vocab_size=65024, hidden_size=4544, num_hidden_layers=32, num_attention_heads=71)
  # Of the first files; the reference never had the other kind.
  c.only('apply_residual_connection_post_layernorm', False, default=False)
  embed = c.get('hidden_size', 'n_embed')
  heads = c.get('num_attention_heads', 'n_head')
  # The first files of 40B say it by their count of groups alone.
  new = c.get('new_decoder_architecture', default=c.get('n_head_kv', default=None) is not None)
  many = c.get('multi_query', default=True)
  listed = c.get('num_kv_heads', 'n_head_kv', default=heads)
  alibi = c.get('alibi', default=False)
  biased = c.get('bias', default=False)
  # The new architecture counts its groups; the old one has one or as many as queries.
  kv_heads = listed if new else 1 if many else heads
  parallel = c.get('parallel_attn', default=True) or new
  norms = c.get('num_ln_in_parallel_attn', default=2 if new else 1)
  length = c.get('max_position_embeddings', default=2048)
  rope = {} if alibi else c.rope(max_length=length)
  if alibi:
    c.read.update(('rope_parameters', 'rope_theta', 'rope_scaling'))
  return DecoderConfig(
      vocab=c.get('vocab_size'), embed=embed, layers=c.get('num_hidden_layers', 'n_layer'),
      heads=heads, kv_heads=kv_heads, mlp=c.get('ffn_hidden_size', default=4 * embed),
      mlp_form='plain', activation=c.activation('activation', default='gelu'), norm='layernorm',
      norm_eps=c.get('layer_norm_epsilon', default=1e-5), max_length=length,
      block=('serial' if not parallel else 'parallel_norms' if new and norms == 2 else 'parallel'),
      position='alibi' if alibi else 'rope',
      alibi_scale=_ALIBI_SCALE * (embed // heads) ** -0.5 if alibi else 1.0,
      alibi_rounding='bfloat16' if alibi else 'none',
      embeddings=c.embeddings(default=True),
      biases=('qkv', 'out', 'mlp', 'norm') if biased else ('norm',), **rope)


def _write(config: DecoderConfig) -> dict[str, Any]:
  names.require(config, 'falcon', norm='layernorm', mlp_form='plain', alibi_max=8.0)
  new = _new(config)
  return {'vocab_size': config.vocab, 'hidden_size': config.embed,
          'num_hidden_layers': config.layers, 'num_attention_heads': config.heads,
          'num_kv_heads': config.num_kv_heads, 'new_decoder_architecture': new,
          'multi_query': new or config.num_kv_heads == 1, 'ffn_hidden_size': config.mlp,
          'parallel_attn': config.block != 'serial', 'alibi': config.position == 'alibi',
          'num_ln_in_parallel_attn': {'parallel_norms': 2, 'parallel': 1}.get(config.block),
          'bias': 'mlp' in config.biases, 'activation': names.ACTIVATIONS[config.activation],
          'layer_norm_epsilon': config.norm_eps, 'max_position_embeddings': config.max_length,
          'tie_word_embeddings': config.embeddings == 'tied',
          'rope_parameters': names.rope(config)}


def _new(config: DecoderConfig) -> bool:
  """Whether only the new architecture can say it."""
  return config.block == 'parallel_norms' or config.num_kv_heads not in (1, config.heads)


def _rows(config: DecoderConfig) -> list[Row]:
  where, ours = 'transformer.h.{layer}', 'layers/attention'
  first, second = ('ln_attn', 'ln_mlp') if config.block == 'parallel_norms' else (
      'input_layernorm', 'post_attention_layernorm')
  return [row('transformer.word_embeddings.weight', 'embed/embedding', 'vocab embed'),
          *names.joined(f'{where}.self_attention.query_key_value', config, groups='kv_heads'),
          *names.linear(f'{where}.self_attention.dense', f'{ours}/out', 'embed (heads head_dim)',
                         bias='out' in config.biases),
          *names.norm(f'{where}.{first}', 'layers/norm1', config),
          *(names.norm(f'{where}.{second}', 'layers/norm2', config)
            if config.block != 'parallel' else []),
          *names.plain(f'{where}.mlp.dense_h_to_4h', f'{where}.mlp.dense_4h_to_h', config),
          *names.norm('transformer.ln_f', 'norm', config), *names.head('lm_head', config)]


FAMILIES = (Family(
    name='falcon', model_types=('falcon', 'RefinedWeb', 'RefinedWebModel'),
    architecture='FalconForCausalLM', read=_read, write=_write, rows=_rows, model=DecoderLM,
    older=names.older_rope),)
