"""Mixtral (arXiv:2401.04088): a Mistral whose MLPs are mixtures of experts."""

from typing import Any

from models.config import DecoderConfig
from models.decoder import DecoderLM
from models.hf import llama, mistral, names
from models.hf.family import Family
from models.hf.settings import Settings
from models.hf.table import Row, fused, row


def _read(c: Settings) -> DecoderConfig:
  c.assume(vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
           num_attention_heads=32, num_key_value_heads=8)
  length = c.get('max_position_embeddings', default=131072)
  return llama.read(
      c, experts=c.get('num_local_experts', 'num_experts', default=8), max_length=length,
      experts_per_token=c.get('num_experts_per_tok', default=2),
      norm_eps=c.get('rms_norm_eps', default=1e-5),
      **c.rope(max_length=length, theta=1e6), **mistral.windows(c))


def _write(config: DecoderConfig) -> dict[str, Any]:
  names.require(config, 'mixtral', biases=(), router_weights='renormalised')
  return {**names.llama_settings(config), 'num_local_experts': config.experts,
          'num_experts_per_tok': config.experts_per_token, 'sliding_window': config.window}


def _around(config: DecoderConfig) -> list[Row]:
  """Everything but the experts."""
  where = 'model.layers.{layer}'
  return [*names.llama_body(config),
          row(f'{where}.block_sparse_moe.gate.weight', 'layers/mlp/router/kernel',
              'experts embed'),
          *names.norm(f'{where}.input_layernorm', 'layers/norm1', config),
          *names.norm(f'{where}.post_attention_layernorm', 'layers/norm2', config)]


def _rows(config: DecoderConfig) -> list[Row]:
  expert = 'model.layers.{layer}.block_sparse_moe.experts.{expert}'
  return [*_around(config), row(f'{expert}.w1.weight', 'layers/mlp/gate/kernel', 'mlp embed'),
          row(f'{expert}.w3.weight', 'layers/mlp/up/kernel', 'mlp embed'),
          row(f'{expert}.w2.weight', 'layers/mlp/down/kernel', 'embed mlp')]


def _joined(config: DecoderConfig) -> list[Row]:
  """As transformers 5 holds them in memory, and in files by save_original_format=False."""
  experts, dims = 'model.layers.{layer}.mlp.experts', 'experts mlp embed'
  return [*_around(config),
          fused(f'{experts}.gate_up_proj', ('layers/mlp/gate/kernel', dims),
                ('layers/mlp/up/kernel', dims), along=1),
          row(f'{experts}.down_proj', 'layers/mlp/down/kernel', 'experts embed mlp')]


FAMILIES = (Family(
    name='mixtral', model_types=('mixtral',), architecture='MixtralForCausalLM', read=_read,
    write=_write, rows=_rows, model=DecoderLM, older=names.older_rope, layouts=(_joined,),
    renames=((r'\.mlp\.gate\.', '.block_sparse_moe.gate.'),), ignored=llama.IGNORED),)
