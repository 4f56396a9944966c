"""OLMo 2 (arXiv:2501.00656): norms after the branches, and of whole queries and keys."""

from typing import Any

from models.config import DecoderConfig
from models.decoder import DecoderLM
from models.hf import llama, names
from models.hf.family import Family
from models.hf.settings import Settings
from models.hf.table import Row


def _read(c: Settings) -> DecoderConfig:
  c.assume(vocab_size=50304, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
           num_attention_heads=32, rms_norm_eps=1e-5)
  biases = ('qkv', 'out') if c.get('attention_bias', default=False) else ()
  return llama.read(c, biases=biases, norms='branch', qk_norm='all')


def _write(config: DecoderConfig) -> dict[str, Any]:
  names.require(config, 'olmo2', norms='branch', qk_norm='all')
  settings = names.without_usual_width(names.llama_settings(config), config)
  return {**settings, 'attention_bias': 'qkv' in config.biases}


def _rows(config: DecoderConfig) -> list[Row]:
  where = 'model.layers.{layer}'
  return [*names.llama_body(config), *names.gated(f'{where}.mlp', config),
          *names.norm(f'{where}.post_attention_layernorm', 'layers/after1', config),
          *names.norm(f'{where}.post_feedforward_layernorm', 'layers/after2', config)]


FAMILIES = (Family(
    name='olmo2', model_types=('olmo2',), architecture='Olmo2ForCausalLM', read=_read,
    write=_write, rows=_rows, model=DecoderLM, older=names.older_rope, ignored=llama.IGNORED),)
