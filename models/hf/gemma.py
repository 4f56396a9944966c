"""Gemma 2 (arXiv:2408.00118) and the text part of Gemma 3 (arXiv:2503.19786)."""

from typing import Any

from models.config import DecoderConfig
from models.decoder import DecoderLM
from models.hf import llama, names
from models.hf.family import Family
from models.hf.settings import Settings
from models.hf.table import Row

_DEFAULTS = {
    'hidden_size': 2304, 'intermediate_size': 9216, 'num_hidden_layers': 26,
    'num_attention_heads': 8, 'num_key_value_heads': 4, 'head_dim': 256, 'sliding_window': 4096}


def _read(c: Settings, *, period: int, **more: Any) -> DecoderConfig:
  layers = c.get('num_hidden_layers')
  # Older files have the last layer of every period see everything.
  kinds = c.get('layer_types', default=[
      'sliding_attention' if (i + 1) % period else 'full_attention' for i in range(layers)])
  c.only('use_bidirectional_attention', None, False, default=None)
  # In published files and read by no one.
  for name in ('hidden_act', 'sliding_window_size', '_sliding_window_pattern'):
    c.get(name, default=None)
  embed = c.get('hidden_size')
  return llama.read(
      c, activation=c.activation('hidden_activation', default='gelu_pytorch_tanh'),
      embeddings=c.embeddings(default=True), embed_scale=embed**0.5, norm_offset=1.0, norms='both',
      attention_scale=c.get('query_pre_attn_scalar', default=256) ** -0.5,
      logit_softcap=c.get('final_logit_softcapping', default=None),
      biases=('qkv', 'out') if c.get('attention_bias', default=False) else (),
      **c.windows(kinds, layers=layers), **more)


def _read2(c: Settings) -> DecoderConfig:
  c.assume(**_DEFAULTS, vocab_size=256000, max_position_embeddings=8192,
           final_logit_softcapping=30.0, attn_logit_softcapping=50.0)
  return _read(c, period=2, attention_softcap=c.get('attn_logit_softcapping', default=None))


def _read3(c: Settings) -> DecoderConfig:
  c.assume(**_DEFAULTS, vocab_size=262208, max_position_embeddings=131072)
  # The reference has the setting, and never applies it.
  c.get('attn_logit_softcapping', default=None)
  length = c.get('max_position_embeddings')
  local = c.rope(max_length=length, kind='sliding_attention', theta=1e4,
                 older=('rope_local_base_freq', 'partial_rotary_factor'))
  rope = c.rope(max_length=length, kind='full_attention', theta=1e6)
  return _read(c, period=c.get('sliding_window_pattern', default=6), qk_norm='head',
               local_rope_theta=local['rope_theta'], local_rope_scaling=local['rope_scaling'],
               **rope)


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
  # The reference makes the mask of a window even where no layer has one.
  dropped = {'hidden_act'} | ({'sliding_window'} if config.window is None else set())
  return {k: v for k, v in out.items() if k not in dropped}


def _write2(config: DecoderConfig) -> dict[str, Any]:
  names.require(config, 'gemma2', qk_norm='none', local_rope_theta=None)
  return _settings(config)


def _write3(config: DecoderConfig) -> dict[str, Any]:
  names.require(config, 'gemma3_text', qk_norm='head', attention_softcap=None)
  return {**_settings(config), 'rope_parameters': {
      'full_attention': names.rope(config), 'sliding_attention': names.rope(config, local=True)}}


def _older3(values: dict[str, Any]) -> dict[str, Any]:
  both = values['rope_parameters']
  if both['sliding_attention']['rope_type'] != 'default':
    raise ValueError("gemma3_text's older spelling has no scaling of local layers; write the "
                     "current one")
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
