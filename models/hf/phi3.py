"""Phi-3 (arXiv:2404.14219): a Llama with joined matrices and, for long rows, LongRoPE."""

from typing import Any

from models.config import DecoderConfig
from models.decoder import DecoderLM
from models.hf import llama, names
from models.hf.family import Family
from models.hf.settings import Settings
from models.hf.table import Row, fused


def _read(c: Settings) -> DecoderConfig:
  return llama.read(c, **c.windows(layers=c.get('num_hidden_layers'), default='local'))


def _write(config: DecoderConfig) -> dict[str, Any]:
  names.require(config, 'phi3', biases=())
  settings = names.llama_settings(config)
  if settings.pop('head_dim') * config.heads != config.embed:
    raise ValueError('phi3 has head_dim = hidden_size / num_attention_heads')
  scaling = config.rope_scaling
  if scaling is not None and scaling.original_length is not None:
    settings['original_max_position_embeddings'] = scaling.original_length
  return {**settings, 'sliding_window': config.window}


def _rows(config: DecoderConfig) -> list[Row]:
  where = 'model.layers.{layer}'
  body = [r for r in names.llama_body(config) if not any(
      name in r.theirs for name in ('q_proj', 'k_proj', 'v_proj'))]
  return [*body,
          *names.joined(f'{where}.self_attn.qkv_proj', config),
          fused(f'{where}.mlp.gate_up_proj.weight', ('layers/mlp/gate/kernel', 'mlp embed'),
                ('layers/mlp/up/kernel', 'mlp embed')),
          *names.linear(f'{where}.mlp.down_proj', 'layers/mlp/down', 'embed mlp', bias=False),
          *names.norm(f'{where}.input_layernorm', 'layers/norm1', config),
          *names.norm(f'{where}.post_attention_layernorm', 'layers/norm2', config)]


FAMILIES = (Family(
    name='phi3', model_types=('phi3',), architecture='Phi3ForCausalLM', read=_read, write=_write,
    rows=_rows, model=DecoderLM, older=names.older_rope, ignored=llama.IGNORED),)
