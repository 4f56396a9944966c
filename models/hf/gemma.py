"""Gemma 2 (arXiv:2408.00118) and the text part of Gemma 3 (arXiv:2503.19786)."""

from typing import Any

from models.config import DecoderConfig
from models.decoder import DecoderLM
from models.hf import llama, names
from models.hf.family import Family
from models.hf.settings import Settings
from models.hf.table import Row


def _read(c: Settings, *, pattern: int, **more: Any) -> DecoderConfig:
  layers, window = c.get('num_hidden_layers'), c.get('sliding_window', default=4096)
  c.values['sliding_window'] = window
  period = c.get('sliding_window_pattern', '_sliding_window_pattern', default=pattern)
  if c.get('layer_types', default=None) is None:
    # Older files have the last layer of every period see everything.
    c.values['layer_types'] = ['sliding_attention' if (i + 1) % period else 'full_attention'
                               for i in range(layers)]
  c.only('use_bidirectional_attention', None, False, default=None)
  embed = c.get('hidden_size')
  c.values.setdefault('head_dim', 256)
  return llama.read(
      c, activation=c.activation('hidden_activation', 'hidden_act', default='gelu_pytorch_tanh'),
      embeddings=c.embeddings(default=True), embed_scale=embed**0.5, norm_offset=1.0, norms='both',
      attention_scale=c.get('query_pre_attn_scalar', default=256) ** -0.5,
      attention_softcap=c.get('attn_logit_softcapping', default=None),
      logit_softcap=c.get('final_logit_softcapping', default=None),
      biases=('qkv', 'out') if c.get('attention_bias', default=False) else (),
      **c.windows(layers=layers), **more)


def _read2(c: Settings) -> DecoderConfig:
  return _read(c, pattern=2)


def _read3(c: Settings) -> DecoderConfig:
  head_dim = c.get('head_dim', default=256)
  length = c.get('max_position_embeddings', default=131072)
  rope = c.rope(head_dim=head_dim, max_length=length, kind='full_attention', theta=1e6)
  nested = (c.get('rope_parameters', default=None) or {}).get('sliding_attention')
  local = (nested or {}).get('rope_theta') or c.get('rope_local_base_freq', default=1e4)
  return _read(c, pattern=6, qk_norm='head', local_rope_theta=float(local), **rope)


def _settings(config: DecoderConfig) -> dict[str, Any]:
  names.require(config, 'gemma', norms='both', norm_offset=1.0)
  scale = config.attention_scale or config.width_of_head**-0.5
  kinds = {True: 'sliding_attention', False: 'full_attention'}
  out = {**names.llama_settings(config), 'sliding_window': config.window,
         'query_pre_attn_scalar': scale**-2, 'attention_bias': 'qkv' in config.biases,
         'attn_logit_softcapping': config.attention_softcap,
         'final_logit_softcapping': config.logit_softcap,
         'layer_types': [kinds[kind] for kind in config.local],
         'hidden_activation': {'gelu_tanh': 'gelu_pytorch_tanh'}.get(
             config.activation, names.ACTIVATIONS[config.activation])}
  nearest = round(out['query_pre_attn_scalar'])
  if nearest ** -0.5 == scale:
    out['query_pre_attn_scalar'] = nearest
  return {k: v for k, v in out.items() if k != 'hidden_act'}


def _write2(config: DecoderConfig) -> dict[str, Any]:
  names.require(config, 'gemma2', qk_norm='none', local_rope_theta=None)
  return _settings(config)


def _write3(config: DecoderConfig) -> dict[str, Any]:
  names.require(config, 'gemma3_text', qk_norm='head')
  return {**_settings(config), 'rope_parameters': {
      'full_attention': names.rope(config), 'sliding_attention': names.rope(config, local=True)}}


def _older3(values: dict[str, Any]) -> dict[str, Any]:
  both = values['rope_parameters']
  out = names.older_rope({**values, 'rope_parameters': both['full_attention']})
  return {**out, 'rope_local_base_freq': both['sliding_attention']['rope_theta']}


def _rows(config: DecoderConfig) -> list[Row]:
  where = 'model.layers.{layer}'
  return [*names.llama_body(config), *names.gated(f'{where}.mlp', config),
          *names.norm(f'{where}.input_layernorm', 'layers/norm1', config),
          *names.norm(f'{where}.post_attention_layernorm', 'layers/after1', config),
          *names.norm(f'{where}.pre_feedforward_layernorm', 'layers/norm2', config),
          *names.norm(f'{where}.post_feedforward_layernorm', 'layers/after2', config)]


FAMILIES = (
    Family(name='gemma2', model_types=('gemma2',), architecture='Gemma2ForCausalLM', read=_read2,
           write=_write2, rows=_rows, model=DecoderLM, older=names.older_rope,
           ignored=llama.IGNORED),
    Family(name='gemma3_text', model_types=('gemma3_text',), architecture='Gemma3ForCausalLM',
           read=_read3, write=_write3, rows=_rows, model=DecoderLM, older=_older3,
           ignored=llama.IGNORED),
)
