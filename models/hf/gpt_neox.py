"""GPT-NeoX (arXiv:2204.06745), Pythia and Dolly v2: query, key and value joined per head."""

from typing import Any

from models.config import DecoderConfig
from models.decoder import DecoderLM
from models.hf import names
from models.hf.family import Family
from models.hf.settings import Settings
from models.hf.table import Row, row


def _read(c: Settings) -> DecoderConfig:
  c.assume(vocab_size=50432, hidden_size=6144, num_hidden_layers=44, num_attention_heads=64,
           intermediate_size=24576)
  # Files of transformers 4 repeat two settings under these names, which it does not read.
  for name in ('rope_theta', 'partial_rotary_factor'):
    c.get(name, default=None)
  embed, heads = c.get('hidden_size'), c.get('num_attention_heads')
  length = c.get('max_position_embeddings', default=2048)
  biases = ('qkv', 'out') if c.get('attention_bias', default=True) else ()
  return DecoderConfig(
      vocab=c.get('vocab_size'), embed=embed, layers=c.get('num_hidden_layers'), heads=heads,
      mlp=c.get('intermediate_size'), mlp_form='plain', norm='layernorm',
      activation=c.activation('hidden_act', default='gelu'), max_length=length,
      norm_eps=c.get('layer_norm_eps', default=1e-5), biases=(*biases, 'mlp', 'norm'),
      block=c.choice('use_parallel_residual', default=True, yes='parallel_norms', no='serial'),
      embeddings=c.embeddings(default=False),
      **c.rope(max_length=length, fraction=0.25, older=('rotary_emb_base', 'rotary_pct')))


def _write(config: DecoderConfig) -> dict[str, Any]:
  names.require(config, 'gpt_neox', norm='layernorm', mlp_form='plain')
  rope = names.rope(config)
  return {'vocab_size': config.vocab, 'hidden_size': config.embed,
          'num_hidden_layers': config.layers, 'num_attention_heads': config.heads,
          'intermediate_size': config.mlp, 'hidden_act': names.ACTIVATIONS[config.activation],
          'layer_norm_eps': config.norm_eps, 'max_position_embeddings': config.max_length,
          'use_parallel_residual': config.block == 'parallel_norms',
          'attention_bias': 'qkv' in config.biases,
          'tie_word_embeddings': config.embeddings == 'tied',
          'rope_parameters': {'partial_rotary_factor': config.rope_fraction, **rope}}


def _older(values: dict[str, Any]) -> dict[str, Any]:
  out = names.older_rope(values)
  return {**{k: v for k, v in out.items() if k not in ('rope_theta', 'partial_rotary_factor')},
          'rotary_emb_base': out['rope_theta'], 'rotary_pct': out['partial_rotary_factor']}


def _rows(config: DecoderConfig) -> list[Row]:
  where, ours = 'gpt_neox.layers.{layer}', 'layers/attention'
  return [row('gpt_neox.embed_in.weight', 'embed/embedding', 'vocab embed'),
          *names.joined(f'{where}.attention.query_key_value', config, groups='heads'),
          *names.linear(f'{where}.attention.dense', f'{ours}/out', 'embed (heads head_dim)',
                         bias='out' in config.biases),
          *names.norm(f'{where}.input_layernorm', 'layers/norm1', config),
          *names.norm(f'{where}.post_attention_layernorm', 'layers/norm2', config),
          *names.plain(f'{where}.mlp.dense_h_to_4h', f'{where}.mlp.dense_4h_to_h', config),
          *names.norm('gpt_neox.final_layer_norm', 'norm', config),
          *names.head('embed_out', config)]


FAMILIES = (Family(
    name='gpt_neox', model_types=('gpt_neox',), architecture='GPTNeoXForCausalLM', read=_read,
    write=_write, rows=_rows, model=DecoderLM, older=_older,
    ignored=(r'\.attention\.(masked_)?bias$', r'\.rotary_emb\.inv_freq$')),)
