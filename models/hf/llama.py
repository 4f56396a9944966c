"""Llama 1, 2 and 3 (arXiv:2307.09288, arXiv:2407.21783)."""

from typing import Any

from models.config import DecoderConfig
from models.decoder import DecoderLM
from models.hf import names
from models.hf.family import Family
from models.hf.settings import Settings
from models.hf.table import Row


def read(c: Settings, **more: Any) -> DecoderConfig:
  """Settings of a Llama, and of those who differ from it by `more` and by what they assume."""
  heads, embed = c.get('num_attention_heads'), c.get('hidden_size')
  kv_heads = c.get('num_key_value_heads', default=heads)
  head_dim = c.get('head_dim', default=None) or embed // heads
  length = c.get('max_position_embeddings', default=2048)
  biases = tuple(more.pop('biases', ()))
  rope = {} if 'rope_theta' in more else c.rope(max_length=length)
  return DecoderConfig(**{
      'vocab': c.get('vocab_size'), 'embed': embed, 'layers': c.get('num_hidden_layers'),
      'heads': heads, 'kv_heads': kv_heads,
      'head_dim': head_dim, 'mlp': c.get('intermediate_size'),
      'activation': c.activation('hidden_act', default='silu'), 'norm': 'rmsnorm',
      'norm_eps': c.get('rms_norm_eps', default=1e-6), 'max_length': length,
      'embeddings': c.embeddings(default=False), 'biases': biases,
      **rope, **more})


def _read(c: Settings) -> DecoderConfig:
  c.assume(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
           num_attention_heads=32)
  biases = ('qkv', 'out') if c.get('attention_bias', default=False) else ()
  biases += ('mlp',) if c.get('mlp_bias', default=False) else ()
  return read(c, biases=biases)


def _write(config: DecoderConfig) -> dict[str, Any]:
  biases = set(config.biases)
  return {**names.llama_settings(config), 'attention_bias': 'qkv' in biases,
          'mlp_bias': 'mlp' in biases}


def rows(config: DecoderConfig) -> list[Row]:
  """Names of a Llama with one norm before each branch."""
  where = 'model.layers.{layer}'
  return [*names.llama_body(config), *names.gated(f'{where}.mlp', config),
          *names.norm(f'{where}.input_layernorm', 'layers/norm1', config),
          *names.norm(f'{where}.post_attention_layernorm', 'layers/norm2', config)]


IGNORED = (r'\.rotary_emb\.inv_freq$',)

FAMILIES = (Family(
    name='llama', model_types=('llama',), architecture='LlamaForCausalLM', read=_read,
    write=_write, rows=rows, model=DecoderLM, older=names.older_rope, ignored=IGNORED),)
