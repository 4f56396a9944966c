"""Mistral (arXiv:2310.06825): a Llama whose every layer sees a window."""

from typing import Any

from models.config import DecoderConfig
from models.decoder import DecoderLM
from models.hf import llama, names
from models.hf.family import Family
from models.hf.settings import Settings


def _read(c: Settings) -> DecoderConfig:
  c.assume(vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
           num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072,
           sliding_window=4096)
  return llama.read(c, **windows(c))


def windows(c: Settings) -> dict[str, Any]:
  """The window of every layer; as in the reference, whatever `layer_types` says."""
  c.get('layer_types', default=None)
  layers = c.get('num_hidden_layers')
  return c.windows(['sliding_attention'] * layers, layers=layers)


def _write(config: DecoderConfig) -> dict[str, Any]:
  names.require(config, 'mistral', biases=())
  return {**names.llama_settings(config), 'sliding_window': config.window}


FAMILIES = (Family(
    name='mistral', model_types=('mistral',), architecture='MistralForCausalLM', read=_read,
    write=_write, rows=llama.rows, model=DecoderLM, older=names.older_rope,
    ignored=llama.IGNORED),)
