"""What the folder of a published model says about its tokenizer, in Hugging Face's file formats.

Which token begins, ends and fills a text stands in tokenizer_config.json, in
special_tokens_map.json, or in the tokenizer's own file, and is looked for in this order.
"""

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import tokenizers

# In the order of preference: what comes first holds most of what follows.
_FILES = ('tokenizer.json', 'tokenizer.model', 'spiece.model', 'sentencepiece.bpe.model',
          'sentencepiece.model', 'vocab.json')
ROLES = ('bos', 'eos', 'pad', 'unk', 'mask')


class Said(NamedTuple):
  """What the files beside a tokenizer say about it.

  Attributes:
    special: token by role ('bos', 'eos', 'pad', 'unk'), None for a role that is said to have none;
      a role that is not spoken of is left out.
    added: ids of tokens that were added to those of the tokenizer's file.
    extra_ids: sentinels after the pieces of a SentencePiece file.
  """

  special: Mapping[str, str | None]
  added: Mapping[str, int]
  extra_ids: int


def tokenizer_file(folder: str) -> str:
  """Returns the path of the tokenizer in the folder of a model.

  Raises:
    ValueError: there is none that can be read.
  """
  there = sorted(os.listdir(folder))
  for name in _FILES:
    if name in there and (name != 'vocab.json' or 'merges.txt' in there):
      return os.path.join(folder, name)
  raise ValueError(f'{folder} has no tokenizer: looked for {", ".join(_FILES)} (the last with '
                   f'merges.txt); it has {", ".join(there) or "no file"}')


def said_beside(path: str) -> Said:
  """Returns what stands beside a tokenizer's file.

  Raises:
    ValueError: a file beside it is damaged.
  """
  folder = os.path.dirname(path)
  config = _json(os.path.join(folder, 'tokenizer_config.json'))
  fallback = _json(os.path.join(folder, 'special_tokens_map.json'))
  special: dict[str, str | None] = {}
  for role in ROLES:
    for source in (config, fallback):
      if f'{role}_token' in source and role not in special:
        special[role] = _content(source[f'{role}_token'])
  added = {str(k): int(v) for k, v in
           _json(os.path.join(folder, 'added_tokens.json')).items()}
  for index, token in config.get('added_tokens_decoder', {}).items():
    added.setdefault(_content(token) or '', int(index))
  return Said(special, added, int(config.get('extra_ids') or 0))


def in_tokenizer(model: bytes) -> dict[str, str]:
  """Returns tokens by role as a tokenizer.json itself tells them.

  Args:
    model: contents of the file.
  """
  parsed = json.loads(model)
  found: dict[str, str] = {}
  for step in _steps(parsed.get('post_processor')):
    kind = step.get('type')
    if kind == 'TemplateProcessing':
      before = True
      for part in step.get('single', ()):
        if 'Sequence' in part:
          before = False
        elif 'SpecialToken' in part:
          found.setdefault('bos' if before else 'eos', part['SpecialToken']['id'])
    elif kind in ('BertProcessing', 'RobertaProcessing'):
      found.setdefault('bos', step['cls'][0])
      found.setdefault('eos', step['sep'][0])
  unk = parsed.get('model', {}).get('unk_token')
  if unk:
    found['unk'] = unk
  return found


def byte_level(path: str) -> bytes:
  """Returns as a tokenizer.json the vocab.json and merges.txt of GPT-2 (Radford et al. 2019).

  Args:
    path: of vocab.json; merges.txt lies beside it.

  Raises:
    ValueError: one of the files cannot be read.
  """
  merges = os.path.join(os.path.dirname(path), 'merges.txt')
  try:
    model = tokenizers.models.BPE.from_file(path, merges)
  except Exception as error:  # The library raises plain Exception.
    raise ValueError(f'{path} and {merges} are not a byte-level vocabulary: {error}') from None
  made = tokenizers.Tokenizer(model)
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = tokenizers.decoders.ByteLevel()
  end = '<|endoftext|>'
  if made.token_to_id(end) is not None:
    made.add_special_tokens([tokenizers.AddedToken(end, normalized=False)])
  return made.to_str().encode()


def _steps(processor: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
  if processor is None:
    return
  if processor.get('type') == 'Sequence':
    for one in processor.get('processors', ()):
      yield from _steps(one)
  else:
    yield processor


def _content(token: Any) -> str | None:
  if isinstance(token, Mapping):
    token = token.get('content')
  return token if isinstance(token, str) and token else None


def _json(path: str) -> dict[str, Any]:
  try:
    with open(path, encoding='utf-8') as file:
      found = json.load(file)
  except FileNotFoundError:
    return {}
  except (ValueError, OSError) as error:
    raise ValueError(f'{path} cannot be read: {error}') from None
  if not isinstance(found, dict):
    raise ValueError(f'{path} holds a {type(found).__name__}, not names with values')
  return found
