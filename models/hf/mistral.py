"""Mistral (arXiv:2310.06825): a Llama whose every layer sees a window."""

from typing import Any

from models.config import DecoderConfig
from models.decoder import DecoderLM
from models.hf import llama, names
from models.hf.family import Family
from models.hf.settings import Settings


def _read(c: Settings) -> DecoderConfig:
  return llama.read(c, **c.windows(layers=c.get('num_hidden_layers'), default='local'))


def _write(config: DecoderConfig) -> dict[str, Any]:
  names.require(config, 'mistral', biases=())
  return {**names.llama_settings(config), 'sliding_window': config.window}


FAMILIES = (Family(
    name='mistral', model_types=('mistral',), architecture='MistralForCausalLM', read=_read,
    write=_write, rows=llama.rows, model=DecoderLM, older=names.older_rope,
    ignored=llama.IGNORED),)
