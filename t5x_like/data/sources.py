"""Opening the stores of a mixture together: one cache of files, one vocabulary."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from t5x_like.data import files as files_lib
from t5x_like.data import objectives, vocabularies
from t5x_like.data import store as store_lib
from t5x_like.data.streams import Stream

Sources = Mapping[str, float] | Sequence[str] | str


@dataclasses.dataclass(frozen=True)
class Source:
  """One open source of a mixture.

  Attributes:
    name: of the task.
    store: its token store.
    stream: its documents as a decoder reads them.
    objective: how they become rows.
  """

  name: str
  store: store_lib.Store
  stream: Stream
  objective: objectives.Objective


def names_of(sources: Sources) -> list[str]:
  """Returns the names of sources, sorted.

  Raises:
    ValueError: there is none, or one is given twice.
  """
  names = sorted([sources] if isinstance(sources, str) else sources)
  if not names or len(set(names)) < len(names):
    raise ValueError(f'sources must name at least one source, each once; got {sources!r}')
  return names


def named(sources: Sources, *, store_dir: str) -> Sources:
  """Returns the rates behind the name of a mixture; anything else as it is.

  Args:
    sources: rates, names, the name of a source, or that of a mixture `prepare` wrote down in
      `<store_dir>/mixtures/<name>.json`.
    store_dir: folder that holds the stores.

  Raises:
    ValueError: the mixture's file is not what `prepare` writes.
  """
  store_dir = os.path.expanduser(store_dir)
  if not isinstance(sources, str) or os.path.isdir(os.path.join(store_dir, sources)):
    return sources
  path = os.path.join(store_dir, 'mixtures', f'{sources}.json')
  try:
    with open(path, encoding='utf-8') as file:
      rates = json.load(file)['rates']
    return {str(name): float(rate) for name, rate in rates.items()}
  except FileNotFoundError:
    return sources
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f'{path} is not a mixture as prepare writes it ({error}); run prepare again'
                     ) from None


def vocab_size(*, sources: Sources, store_dir: str, split: str = 'train', multiple: int = 128
               ) -> int:
  """Returns the vocabulary entries a model needs for some sources.

  Args:
    sources: as for a loader.
    store_dir: folder that holds the stores.
    split: whose store is looked at.
    multiple: the size is rounded up to one, so that it splits over devices and fills tiles.

  Raises:
    ValueError: there is no such store.
  """
  check_positive(multiple=multiple)
  sizes = [store_lib.Store(store_lib.store_path(store_dir, source=name, split=split)).vocab_size
           for name in names_of(named(sources, store_dir=store_dir))]
  return -(-max(sizes) // multiple) * multiple


def vocabulary(*, sources: Sources, store_dir: str, split: str = 'train'
               ) -> vocabularies.Vocabulary:
  """Returns the vocabulary that sources were prepared with.

  Args:
    sources: as for a loader.
    store_dir: folder that holds the stores.
    split: whose store is looked at.

  Raises:
    ValueError: there is no such store.
  """
  name = names_of(named(sources, store_dir=store_dir))[0]
  store = store_lib.Store(store_lib.store_path(store_dir, source=name, split=split))
  return vocabularies.from_manifest(store.manifest['vocabulary'], directory=store.path)


def open_all(names: Sequence[str], *, store_dir: str, split: str, length: int,
             packing: objectives.Packing) -> dict[str, Source]:
  """Opens the stores of sources with one bounded cache of files.

  Args:
    names: of the sources.
    store_dir: folder that holds the stores.
    split: of every source.
    length: tokens per row, > 0.
    packing: how documents become rows.

  Raises:
    ValueError: a store is missing, unfinished or damaged, or vocabularies differ.
  """
  files = files_lib.Files()
  opened = {}
  for name in names:
    path = store_lib.store_path(store_dir, source=name, split=split)
    store = store_lib.Store(path, files=files)
    stream = Stream(store)
    opened[name] = Source(name=name, store=store, stream=stream,
                          objective=objectives.make(stream, packing=packing, length=length))
  check_one_vocabulary({name: source.store for name, source in opened.items()})
  return opened


def check_one_vocabulary(stores: Mapping[str, store_lib.Store]) -> None:
  """Raises ValueError if stores, by the names of their sources, have different vocabularies."""
  first = next(iter(stores))
  for name, store in stores.items():
    ours, theirs = (s.manifest['vocabulary'] for s in (stores[first], store))
    ids = [[v.get(f'{role}_id') for role in ('bos', 'eos', 'pad')] for v in (ours, theirs)]
    if ours['fingerprint'] != theirs['fingerprint'] or ids[0] != ids[1]:
      raise ValueError(
        f'sources {first!r} and {name!r} were prepared with different vocabularies '
        f'({ours["kind"]} {ours["fingerprint"][:12]} and {theirs["kind"]} '
        f'{theirs["fingerprint"][:12]}; bos, eos, pad {ids[0]} and {ids[1]}): prepare both '
        f'with the same one')


def check_positive(**values: Any) -> None:
  """Raises ValueError if one of the named values is not a whole number above 0."""
  for name, value in values.items():
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value <= 0:
      raise ValueError(f'{name} must be a whole number above 0, got {value!r}')


def check_choice(value: str, *, name: str, allowed: Sequence[str]) -> None:
  """Raises ValueError if a value is not one of those allowed."""
  if value not in allowed:
    raise ValueError(f'unknown {name} {value!r}; allowed: {", ".join(allowed)}')


def vocabulary_of(source: Source) -> vocabularies.Vocabulary:
  """Returns the vocabulary a source was prepared with: encode, decode, vocab_size, special ids."""
  return vocabularies.from_manifest(source.store.manifest['vocabulary'],
                                    directory=source.store.path)


def locate_document(sources: Mapping[str, Source], text: str) -> list[tuple[str, int]]:
  """Returns the documents a text refers to.

  Args:
    sources: open sources by name.
    text: 'source:index', a content hash (32 hex digits), or a source file's name.

  Returns:
    (source, document) pairs.

  Raises:
    ValueError: nothing is called that.
  """
  name, _, number = text.rpartition(':')
  if name in sources and number.isdecimal():
    count = sources[name].store.num_documents
    if int(number) >= count:
      raise ValueError(f'document {text!r} does not exist: {name!r} holds documents 0 to '
                       f'{count - 1}')
    return [(name, int(number))]
  found = [(s.name, int(i)) for s in sources.values() for i in s.store.find(text)]
  if not found:
    raise ValueError(f'no document {text!r}: give SOURCE:NUMBER with one of the sources '
                     f'{", ".join(sources)}, a content hash of 32 hex digits, or the name of a '
                     f'source file as inspect prints it')
  return found
