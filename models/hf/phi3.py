"""Phi-3 (arXiv:2404.14219): a Llama with joined matrices and, for long rows, LongRoPE."""

from typing import Any

from models.config import DecoderConfig
from models.decoder import DecoderLM
from models.hf import llama, mistral, names
from models.hf.family import Family
from models.hf.settings import Settings
from models.hf.table import Row, fused

# What the first files call it; 'yarn' never meant YaRN here.
_LONG = {'su': 'longrope', 'yarn': 'longrope'}


def _read(c: Settings) -> DecoderConfig:
  c.assume(vocab_size=32064, hidden_size=3072, intermediate_size=8192, num_hidden_layers=32,
           num_attention_heads=32, max_position_embeddings=4096, rms_norm_eps=1e-5,
           original_max_position_embeddings=4096)
  for name in ('attention_bias', 'mlp_bias', 'lm_head_bias'):
    c.only(name, False, default=False)
  # Of the same files; the reference has no such settings.
  for name in ('full_attn_mod', 'interpolate_factor'):
    c.only(name, 1, default=1)
  for name in ('rope_parameters', 'rope_scaling'):
    found = c.get(name, default=None)
    if found is not None:
      c.values[name] = {key: _LONG.get(value, value) if key in ('type', 'rope_type') else value
                        for key, value in found.items()}
  rope = c.rope(max_length=c.get('max_position_embeddings'), fraction=1.0)
  return llama.read(c, **rope, **mistral.windows(c))


def _write(config: DecoderConfig) -> dict[str, Any]:
  names.require(config, 'phi3', biases=())
  settings = names.without_usual_width(names.llama_settings(config), config)
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
