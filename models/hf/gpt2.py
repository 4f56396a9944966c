"""GPT-2, whose matrices lie as [in, out], and Bark's semantic model, with a head of its own."""

from typing import Any

import numpy as np

from models.config import DecoderConfig
from models.decoder import DecoderLM
from models.hf import names
from models.hf.family import Family
from models.hf.settings import Settings
from models.hf.table import Row, fused, row

_EVERYWHERE = ('qkv', 'out', 'mlp', 'norm')


def _read(c: Settings) -> DecoderConfig:
  c.assume(vocab_size=50257, n_embd=768, n_layer=12, n_head=12, n_positions=1024)
  c.only('add_cross_attention', False, default=False)
  embed = c.get('n_embd', 'hidden_size')
  return DecoderConfig(
      vocab=c.get('vocab_size'), embed=embed, layers=c.get('n_layer', 'num_hidden_layers'),
      heads=c.get('n_head', 'num_attention_heads'),
      mlp=c.get('n_inner', default=4 * embed), mlp_form='plain', norm='layernorm',
      activation=c.activation('activation_function', default='gelu_new'), position='learned',
      norm_eps=c.get('layer_norm_epsilon', default=1e-5),
      max_length=c.get('n_positions', 'max_position_embeddings'),
      embeddings=c.embeddings(default=True), biases=_EVERYWHERE,
      attention_depth=c.choice('scale_attn_by_inverse_layer_idx', default=False, yes='inverse',
                               no='same'),
      attention_scale=c.choice('scale_attn_weights', default=True, yes=None, no=1.0))


def _write(config: DecoderConfig) -> dict[str, Any]:
  names.require(config, 'gpt2', position='learned', biases=_EVERYWHERE, mlp_form='plain')
  return {'vocab_size': config.vocab, 'n_embd': config.embed, 'n_layer': config.layers,
          'n_head': config.heads, 'n_inner': config.mlp, 'n_positions': config.max_length,
          'activation_function': names.ACTIVATIONS[config.activation],
          'layer_norm_epsilon': config.norm_eps,
          'scale_attn_weights': config.attention_scale is None,
          'scale_attn_by_inverse_layer_idx': config.attention_depth == 'inverse',
          'tie_word_embeddings': config.embeddings == 'tied'}


def _joined(where: str, dims: str, out: str, what: str) -> Row:
  ours = 'layers/attention'
  parts = [(f'{ours}/{name}/{what}', dims) for name in ('query', 'key', 'value')]
  parts[1:] = [(path, d.replace('(heads', '(kv_heads')) for path, d in parts[1:]]
  return fused(f'{where}.{out}', *parts, along=1 if dims.startswith('embed') else 0)


def _rows(config: DecoderConfig) -> list[Row]:
  where, ours = 'transformer.h.{layer}', 'layers/attention'
  return [
      row('transformer.wte.weight', 'embed/embedding', 'vocab embed'),
      row('transformer.wpe.weight', 'position/embedding', 'position embed'),
      *names.norm(f'{where}.ln_1', 'layers/norm1', config),
      _joined(where, 'embed (heads head_dim)', 'attn.c_attn.weight', 'kernel'),
      _joined(where, '(heads head_dim)', 'attn.c_attn.bias', 'bias'),
      row(f'{where}.attn.c_proj.weight', f'{ours}/out/kernel', '(heads head_dim) embed'),
      row(f'{where}.attn.c_proj.bias', f'{ours}/out/bias', 'embed'),
      *names.norm(f'{where}.ln_2', 'layers/norm2', config),
      row(f'{where}.mlp.c_fc.weight', 'layers/mlp/up/kernel', 'embed mlp'),
      row(f'{where}.mlp.c_fc.bias', 'layers/mlp/up/bias', 'mlp'),
      row(f'{where}.mlp.c_proj.weight', 'layers/mlp/down/kernel', 'mlp embed'),
      row(f'{where}.mlp.c_proj.bias', 'layers/mlp/down/bias', 'embed'),
      *names.norm('transformer.ln_f', 'norm', config), *names.head('lm_head', config)]


def _read_bark(c: Settings) -> DecoderConfig:
  c.assume(input_vocab_size=10048, output_vocab_size=10048, hidden_size=768, num_layers=12,
           num_heads=12, block_size=1024)
  embed = c.get('hidden_size')
  biases = _EVERYWHERE if c.get('bias', default=True) else ()
  return DecoderConfig(
      vocab=c.get('input_vocab_size', 'vocab_size'), out_vocab=c.get('output_vocab_size'),
      embed=embed, layers=c.get('num_layers', 'num_hidden_layers'),
      heads=c.get('num_heads', 'num_attention_heads'), mlp=4 * embed, mlp_form='plain',
      norm='layernorm', norm_eps=1e-5, activation='gelu', position='learned',
      max_length=c.get('block_size', 'window_size'), embeddings='untied', biases=biases)


def _write_bark(config: DecoderConfig) -> dict[str, Any]:
  names.require(config, 'bark_semantic', position='learned', mlp_form='plain')
  return {'input_vocab_size': config.vocab, 'output_vocab_size': config.head_vocab,
          'hidden_size': config.embed, 'num_layers': config.layers, 'num_heads': config.heads,
          'block_size': config.max_length, 'bias': bool(config.biases)}


def _rows_bark(config: DecoderConfig) -> list[Row]:
  where, ours, bias = 'layers.{layer}', 'layers/attention', bool(config.biases)
  return [
      row('input_embeds_layer.weight', 'embed/embedding', 'vocab embed'),
      row('position_embeds_layer.weight', 'position/embedding', 'position embed'),
      *names.norm(f'{where}.layernorm_1', 'layers/norm1', config),
      *names.joined(f'{where}.attn.att_proj', config),
      *names.linear(f'{where}.attn.out_proj', f'{ours}/out', 'embed (heads head_dim)', bias=bias),
      *names.norm(f'{where}.layernorm_2', 'layers/norm2', config),
      *names.plain(f'{where}.mlp.in_proj', f'{where}.mlp.out_proj', config),
      *names.norm('layernorm_final', 'norm', config), *names.head('lm_head', config)]


def _masks(config: DecoderConfig) -> dict[str, np.ndarray]:
  """The causal masks that Bark's files hold."""
  causal = np.tril(np.ones((config.max_length,) * 2, bool))[None, None]
  return {f'layers.{i}.attn.bias': causal for i in range(config.layers)}


FAMILIES = (
    Family(name='gpt2', model_types=('gpt2',), architecture='GPT2LMHeadModel', read=_read,
           write=_write, rows=_rows, model=DecoderLM,
           renames=((r'^(wte|wpe|h|ln_f)\.', r'transformer.\1.'),),
           ignored=(r'\.attn\.(masked_)?bias$',)),
    Family(name='bark_semantic', model_types=('semantic',), architecture='BarkSemanticModel',
           read=_read_bark, write=_write_bark, rows=_rows_bark, model=DecoderLM,
           renames=((r'^semantic\.', ''),), ignored=(r'\.attn\.bias$',), constants=_masks),
)
