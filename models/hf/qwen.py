"""Qwen 2 (arXiv:2407.10671; biases on queries, keys and values) and Qwen 3 (arXiv:2505.09388;
norms of queries and keys instead)."""

from typing import Any

from models.config import DecoderConfig
from models.decoder import DecoderLM
from models.hf import llama, names
from models.hf.family import Family
from models.hf.settings import Settings


def _windows(c: Settings) -> dict[str, Any]:
  layers, used = c.get('num_hidden_layers'), c.get('use_sliding_window', default=False)
  start = c.get('max_window_layers', default=layers)
  if used and c.get('layer_types', default=None) is None:
    # Older files say from which layer on the window holds.
    kinds = ['full_attention' if i < start else 'sliding_attention' for i in range(layers)]
    c.values['layer_types'] = kinds
  return c.windows(layers=layers, used=used)


def _read2(c: Settings) -> DecoderConfig:
  return llama.read(c, biases=('qkv',), **_windows(c))


def _read3(c: Settings) -> DecoderConfig:
  biases = ('qkv', 'out') if c.get('attention_bias', default=False) else ()
  # Where the file is silent, 128 is what the reference takes.
  c.values.setdefault('head_dim', 128)
  return llama.read(c, biases=biases, qk_norm='head', **_windows(c))


def _window_settings(config: DecoderConfig) -> dict[str, Any]:
  kinds = {True: 'sliding_attention', False: 'full_attention'}
  return {'use_sliding_window': config.window is not None, 'sliding_window': config.window,
          'max_window_layers': config.local.index(True) if True in config.local else config.layers,
          'layer_types': [kinds[kind] for kind in config.local]}


def _write2(config: DecoderConfig) -> dict[str, Any]:
  names.require(config, 'qwen2', biases=('qkv',), qk_norm='none')
  settings = names.llama_settings(config)
  if settings.pop('head_dim') * config.heads != config.embed:
    raise ValueError('qwen2 has head_dim = hidden_size / num_attention_heads')
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
