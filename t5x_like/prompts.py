"""What stands around a prompt: the tokens before and after it, and those that end the answer.

A run's model is prompted as it was trained. That of an import is prompted as its own files say: the
tokens its tokenizer puts around a text, and the ids of generation_config.json or config.json.
"""

import dataclasses
import json
import os
from typing import Any

from t5x_like.interchange import folder, importing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frame:
  """Ids around a prompt.

  Attributes:
    before: of what a decoder continues.
    after: of what an encoder reads.
    begin: what a decoder continues where there is nothing else.
    start: first input of a decoder behind an encoder.
    stop: each ends the text.
  """

  before: tuple[int, ...]
  after: tuple[int, ...]
  begin: int
  start: int
  stop: tuple[int, ...]


def kept(checkpoint: str) -> str | None:
  """Returns the folder in which an import keeps its settings and tokenizer, None if there is none.

  Args:
    checkpoint: directory of checkpoints, or one checkpoint in it.
  """
  path = os.path.normpath(os.path.expanduser(checkpoint))
  base = os.path.dirname(path) if os.path.basename(path).isdigit() else path
  found = os.path.join(base, importing.KEPT)
  return found if os.path.isdir(found) else None


def frame(checkpoint: str, *, vocabulary: Any, bos_id: int | None = None) -> Frame:
  """Returns what stands around the prompts of a checkpoint's model.

  Args:
    checkpoint: directory of checkpoints, or one checkpoint in it.
    vocabulary: encodes the prompts.
    bos_id: id before a prompt, and first input of a decoder; None: as it is said there.
  Raises:
    ValueError: a file of an import is damaged.
  """
  given = kept(checkpoint)
  found = (of_training(vocabulary) if given is None else
           of_files(folder.settings(given).values, _read(given, 'generation_config.json'),
                    _read(given, 'tokenizer_config.json'), vocabulary=vocabulary))
  if bos_id is None:
    return found
  return dataclasses.replace(found, before=(bos_id,), begin=bos_id, start=bos_id)


def of_training(vocabulary: Any) -> Frame:
  """Returns what stood around the documents of a run: a begin id, or padding where there is none.

  Args:
    vocabulary: of the run.
  """
  begin: int = vocabulary.pad_id if vocabulary.bos_id is None else vocabulary.bos_id
  end = () if vocabulary.eos_id is None else (vocabulary.eos_id,)
  return Frame(before=(begin,), after=end, begin=begin, start=begin, stop=end)


def of_files(config: dict[str, Any], generation: dict[str, Any], tokenizer: dict[str, Any], *,
             vocabulary: Any) -> Frame:
  """Returns what the files of a published model say.

  Args:
    config: of config.json.
    generation: of generation_config.json; what it says comes first.
    tokenizer: of tokenizer_config.json.
    vocabulary: its tokenizer.
  """
  def said(name: str) -> Any:
    places = (generation, config, config.get('text_config') or {})
    return next((p[name] for p in places if p.get(name) is not None), None)

  first = lambda *ids: next((i for i in ids if i is not None), vocabulary.pad_id)
  ends = said('eos_token_id')
  ends = [vocabulary.eos_id] if ends is None else ends if isinstance(ends, list) else [ends]
  stop = tuple(i for i in ends if i is not None)
  begin = first(said('bos_token_id'), vocabulary.bos_id, *stop)
  before, after = around(vocabulary)
  adds = tokenizer.get('add_bos_token')
  if adds is not None:
    before = (first(vocabulary.bos_id, begin),) if adds else ()
  start = first(said('decoder_start_token_id'), said('bos_token_id'), said('pad_token_id'))
  return Frame(before=before, after=after, begin=begin, start=start, stop=stop)


def around(vocabulary: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Returns the ids that a tokenizer puts before and after a text.

  Args:
    vocabulary: with `encode_with_special`, or without: then there are none.
  """
  if not hasattr(vocabulary, 'encode_with_special'):
    return (), ()
  inner, whole = vocabulary.encode('a'), vocabulary.encode_with_special('a')
  for at in range(len(whole) - len(inner) + 1):
    if whole[at:at + len(inner)] == inner:
      return tuple(whole[:at]), tuple(whole[at + len(inner):])
  return (), ()


def _read(given: str, name: str) -> dict[str, Any]:
  path = os.path.join(given, name)
  if not os.path.exists(path):
    return {}
  try:
    with open(path, encoding='utf-8') as file:
      found = json.load(file)
  except ValueError as error:
    raise ValueError(f'{path} is not JSON: {error}') from None
  if not isinstance(found, dict):
    raise ValueError(f'{path} must hold a JSON object, got {type(found).__name__}')
  return found
