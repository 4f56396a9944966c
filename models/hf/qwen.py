"""Qwen 2 (arXiv:2407.10671; biases on queries, keys and values) and Qwen 3 (arXiv:2505.09388;
norms of queries and keys instead)."""

from typing import Any

from models.config import DecoderConfig
from models.decoder import DecoderLM
from models.hf import llama, names
from models.hf.family import Family
from models.hf.settings import Settings

_DEFAULTS = {
    'vocab_size': 151936, 'hidden_size': 4096, 'intermediate_size': 22016, 'num_hidden_layers': 32,
    'num_attention_heads': 32, 'num_key_value_heads': 32, 'max_position_embeddings': 32768,
    'sliding_window': 4096, 'max_window_layers': 28}


def _windows(c: Settings) -> dict[str, Any]:
  layers = c.get('num_hidden_layers')
  # Older files say from which layer on the window holds.
  start = c.get('max_window_layers', default=28)
  kinds = c.get('layer_types', default=[
      'full_attention' if i < start else 'sliding_attention' for i in range(layers)])
  return c.windows(kinds, layers=layers,
                   holds=c.choice('use_sliding_window', default=False, yes='said', no='never'))


def _read2(c: Settings) -> DecoderConfig:
  c.assume(**_DEFAULTS)
  return llama.read(c, biases=('qkv',), **_windows(c))


def _read3(c: Settings) -> DecoderConfig:
  c.assume(**_DEFAULTS, head_dim=128)
  biases = ('qkv', 'out') if c.get('attention_bias', default=False) else ()
  return llama.read(c, biases=biases, qk_norm='head', **_windows(c))


def _window_settings(config: DecoderConfig) -> dict[str, Any]:
  kinds = {True: 'sliding_attention', False: 'full_attention'}
  return {'use_sliding_window': config.window is not None, 'sliding_window': config.window,
          'max_window_layers': config.local.index(True) if True in config.local else config.layers,
          'layer_types': [kinds[kind] for kind in config.local]}


def _write2(config: DecoderConfig) -> dict[str, Any]:
  names.require(config, 'qwen2', biases=('qkv',), qk_norm='none')
  settings = names.without_usual_width(names.llama_settings(config), config)
  return {**settings, **_window_settings(config)}


def _write3(config: DecoderConfig) -> dict[str, Any]:
  return {**names.llama_settings(config), **_window_settings(config),
          'attention_bias': 'qkv' in config.biases}


FAMILIES = (
    Family(name='qwen2', model_types=('qwen2',), architecture='Qwen2ForCausalLM', read=_read2,
           write=_write2, rows=llama.rows, model=DecoderLM, older=names.older_rope,
           ignored=llama.IGNORED),
    Family(name='qwen3', model_types=('qwen3',), architecture='Qwen3ForCausalLM', read=_read3,
           write=_write3, rows=llama.rows, model=DecoderLM, older=names.older_rope,
           ignored=llama.IGNORED),
)
