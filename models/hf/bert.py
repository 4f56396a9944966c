"""BERT (arXiv:1810.04805) and RoBERTa (arXiv:1907.11692) with their masked-token heads."""

from collections.abc import Callable
from functools import partial
from typing import Any

from models.config import DecoderConfig
from models.encoder import EncoderConfig, EncoderLM
from models.hf import names
from models.hf.family import Family
from models.hf.settings import Settings
from models.hf.table import Row, row

_EVERYWHERE = ('qkv', 'out', 'mlp', 'norm', 'head')


def _read(c: Settings, vocab: int = 30522, **more: Any) -> EncoderConfig:
  c.only('is_decoder', False, default=False)
  c.only('add_cross_attention', False, default=False)
  c.only('position_embedding_type', 'absolute', default='absolute')
  stack = DecoderConfig(
      vocab=c.get('vocab_size', default=vocab), embed=c.get('hidden_size', default=768),
      layers=c.get('num_hidden_layers', default=12), heads=c.get('num_attention_heads', default=12),
      mlp=c.get('intermediate_size', default=3072), mlp_form='plain',
      activation=c.activation('hidden_act', default='gelu'), norm='layernorm', norms='residual',
      norm_eps=c.get('layer_norm_eps', default=1e-12), position='learned', biases=_EVERYWHERE,
      max_length=c.get('max_position_embeddings', default=512),
      embeddings=c.embeddings(default=True))
  return EncoderConfig(stack=stack, types=c.get('type_vocab_size', default=2), **more)


def _read_roberta(c: Settings) -> EncoderConfig:
  # Its padding has the position of the same number as its padding token; text comes after it.
  # Its head has the exact GELU, whatever the blocks have.
  return _read(c, vocab=50265, first_position=c.get('pad_token_id', default=1) + 1,
               head_activation='gelu')


def _settings(config: EncoderConfig, name: str) -> dict[str, Any]:
  stack = config.stack
  if not config.types:
    raise ValueError(f'{name} has token types, but the configuration has types=0')
  names.require(stack, name, norm='layernorm', norms='residual', position='learned',
                mlp_form='plain', biases=_EVERYWHERE)
  return {'vocab_size': stack.vocab, 'hidden_size': stack.embed, 'num_hidden_layers': stack.layers,
          'num_attention_heads': stack.heads, 'intermediate_size': stack.mlp,
          'hidden_act': names.ACTIVATIONS[stack.activation], 'layer_norm_eps': stack.norm_eps,
          'max_position_embeddings': stack.max_length, 'type_vocab_size': config.types,
          'tie_word_embeddings': stack.embeddings == 'tied'}


def _write(config: EncoderConfig) -> dict[str, Any]:
  if config.head_activation is not None:
    raise ValueError(f'bert has the activation of its blocks in its head, but the configuration '
                     f'has head_activation={config.head_activation!r}')
  return _settings(config, 'bert')


def _write_roberta(config: EncoderConfig) -> dict[str, Any]:
  if config.first_position < 1:
    raise ValueError('roberta has first_position=pad_token_id + 1, but the configuration has 0')
  if (config.head_activation or config.stack.activation) != 'gelu':
    raise ValueError("roberta has head_activation='gelu', whatever its blocks have")
  return {**_settings(config, 'roberta'), 'pad_token_id': config.first_position - 1}


def _body(root: str, config: EncoderConfig) -> list[Row]:
  stack, embeddings, where = config.stack, f'{root}.embeddings', f'{root}.encoder.layer.{{layer}}'
  return [
      row(f'{embeddings}.word_embeddings.weight', 'embed/embedding', 'vocab embed'),
      row(f'{embeddings}.position_embeddings.weight', 'position/embedding', 'position embed'),
      row(f'{embeddings}.token_type_embeddings.weight', 'types/embedding', 'types embed'),
      *names.norm(f'{embeddings}.LayerNorm', 'embed_norm', stack),
      *names.attention(f'{where}.attention', stack, query='self.query', key='self.key',
                       value='self.value', out='output.dense'),
      *names.norm(f'{where}.attention.output.LayerNorm', 'layers/after1', stack),
      *names.plain(f'{where}.intermediate.dense', f'{where}.output.dense', stack),
      *names.norm(f'{where}.output.LayerNorm', 'layers/after2', stack)]


def _head(dense: str, norm: str, where: str, config: EncoderConfig, bias: str) -> list[Row]:
  stack = config.stack
  tied = stack.embeddings == 'tied'
  return [*names.linear(dense, 'transform', 'mlp embed', bias=True),
          *names.norm(norm, 'transform_norm', stack),
          *([] if tied else [row(f'{where}.decoder.weight', 'head/kernel', 'vocab embed')]),
          row(f'{where}.{bias}', 'head_bias' if tied else 'head/bias', 'vocab')]


def _own(config: EncoderConfig) -> str:
  # The bias that computes: the other one is a tensor of its own where the table is.
  return 'bias' if config.stack.embeddings == 'tied' else 'decoder.bias'


def _other(config: EncoderConfig) -> str:
  return 'decoder.bias' if config.stack.embeddings == 'tied' else 'bias'


def _rows(config: EncoderConfig, bias: Callable[[EncoderConfig], str] = _own) -> list[Row]:
  head = 'cls.predictions'
  return [*_body('bert', config), *_head(f'{head}.transform.dense', f'{head}.transform.LayerNorm',
                                         head, config, bias(config))]


def _rows_roberta(config: EncoderConfig, bias: Callable[[EncoderConfig], str] = _own) -> list[Row]:
  return [*_body('roberta', config),
          *_head('lm_head.dense', 'lm_head.layer_norm', 'lm_head', config, bias(config))]


# The first files call a norm's scale and shift gamma and beta, and lack the name of the model.
_OLD = ((r'LayerNorm\.gamma$', 'LayerNorm.weight'), (r'LayerNorm\.beta$', 'LayerNorm.bias'))
# Heads of other tasks, which published files hold beside that of masked tokens.
_OTHERS = (r'\.position_ids$', r'(^|\.)pooler\.', r'^cls\.seq_relationship\.')

FAMILIES = (
    Family(name='bert', model_types=('bert',), architecture='BertForMaskedLM', read=_read,
           write=_write, rows=_rows, model=EncoderLM,
           renames=(*_OLD, (r'^(embeddings|encoder|pooler)\.', r'bert.\1.')), ignored=_OTHERS,
           layouts=(partial(_rows, bias=_other),),
           spare={'cls.predictions.bias': 'cls.predictions.decoder.bias'}),
    Family(name='roberta', model_types=('roberta',), architecture='RobertaForMaskedLM',
           read=_read_roberta, write=_write_roberta, rows=_rows_roberta, model=EncoderLM,
           renames=(*_OLD, (r'^(embeddings|encoder|pooler)\.', r'roberta.\1.')), ignored=_OTHERS,
           layouts=(partial(_rows_roberta, bias=_other),),
           spare={'lm_head.bias': 'lm_head.decoder.bias'}),
)
