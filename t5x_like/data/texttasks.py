"""Tasks over text files that need no TensorFlow, and mixtures of them."""

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from t5x_like.data import textfiles, vocabularies

_NAME = re.compile(r'[\w.:#]+')


class Unit(NamedTuple):
  """What one shard is made from.

  Attributes:
    names: names of its inputs, for its key and for messages.
    bytes: of its inputs, for the progress shown.
    key: which part of the inputs it is; JSON-able.
    parts: whatever the task needs to read it; pickled.
  """

  names: tuple[str, ...]
  bytes: int
  key: Any
  parts: Any


class Division(NamedTuple):
  """How documents divide into train and held-out ones.

  Attributes:
    moved: hash of the one document (and its copies) whose split is not that of its hash, since one
      split would have none otherwise.
    different: number of different documents, 2 for any more.
  """

  moved: bytes | None
  different: int


_divisions: dict[str, Division] = {}  # By what was read: finding one can take a whole pass.


class Preparable(Protocol):
  """A task `prepare` can turn into stores; it is pickled into worker processes."""

  @property
  def name(self) -> str:
    """Name of the task and of its folder of stores."""
    ...

  @property
  def feature_vocabularies(self) -> Mapping[str, vocabularies.Vocabulary]:
    """Vocabulary of each feature."""
    ...

  @property
  def splits(self) -> Sequence[str]:
    """Names of its splits."""
    ...

  @property
  def portable(self) -> bool:
    """Whether another process can read it."""
    ...

  def definition(self) -> dict[str, Any]:
    """Returns what decides the tokens, inputs and vocabulary apart; JSON-able."""
    ...

  def files(self) -> list[textfiles.File]:
    """Returns the input files, none if the inputs are no files."""
    ...

  def units(self, split: str) -> list[Unit]:
    """Returns what the shards are made from, in canonical order."""
    ...

  def documents(self, unit: Unit, *, split: str, skipped: list[textfiles.Skipped]
                ) -> Iterator[dict[str, Any]]:
    """Yields the documents of one shard as `shards.write_shard` takes them."""
    ...


@dataclasses.dataclass(frozen=True)
class TextTask:
  """Documents of text files, tokenized, each ending in EOS.

  Held-out documents are whole documents, chosen by their content, so that copies of a document are
  all on one side. Of two different documents or more, at least one is held out and one is not.

  Attributes:
    name: letters, digits and `_.:#`.
    source: where the text is.
    vocabulary: of every feature; None until `prepare` or `with_vocabulary` gives one.
    validation_fraction: expected share of documents held out, in [0, 1).
    eos: features that end in EOS.
  """

  name: str
  source: textfiles.Text
  vocabulary: vocabularies.Vocabulary | None = None
  validation_fraction: float = 0.05
  eos: Sequence[str] = ('targets',)

  def __post_init__(self):
    check_name(self.name)
    if not 0 <= self.validation_fraction < 1:
      raise ValueError(f'validation_fraction={self.validation_fraction} must be in [0, 1)')
    unknown = set(self.eos) - set(self.source.keys)
    if isinstance(self.eos, str) or unknown:
      raise ValueError(f'eos={self.eos!r} must list features; there are: '
                       f'{", ".join(self.source.keys)}')

  @property
  def portable(self) -> bool:
    """Whether another process can read it: always."""
    return True

  def with_vocabulary(self, vocabulary: vocabularies.Vocabulary) -> 'TextTask':
    """Returns the same task with this vocabulary."""
    return dataclasses.replace(self, vocabulary=vocabulary)

  @property
  def feature_vocabularies(self) -> dict[str, vocabularies.Vocabulary]:
    """Vocabulary of each feature."""
    if self.vocabulary is None:
      raise ValueError(f'task {self.name!r} has no vocabulary: give prepare one')
    return dict.fromkeys(self.source.keys, self.vocabulary)

  @property
  def splits(self) -> tuple[str, ...]:
    """Names of its splits."""
    return ('train', 'validation') if self.validation_fraction else ('train',)

  def definition(self) -> dict[str, Any]:
    """Returns what decides the tokens, inputs and vocabulary apart."""
    return {'kind': 'text', **self.source.definition(), 'eos': sorted(self.eos),
            'validation_fraction': self.validation_fraction}

  def files(self) -> list[textfiles.File]:
    """Returns the input files in canonical order."""
    return self.source.files()

  def units(self, split: str) -> list[Unit]:
    """Returns runs of files: how many depends on their sizes alone, not on who works on them."""
    files = self.files()
    size = min(max(sum(f.bytes for f in files) / 64, 1 << 20), 256 << 20)
    runs: list[list[textfiles.Part]] = [[]]
    moved = self.division().moved
    for part in (p for file in files for p in textfiles.parts(file, size=size)):
      if runs[-1] and sum(p.bytes for p in runs[-1]) + part.bytes > size:
        runs.append([])
      runs[-1].append(part)
    # Every split reads all files, but what it leaves out costs next to nothing.
    held_out = self.validation_fraction
    share = held_out if split == 'validation' else 1 - held_out
    also = [moved.hex()] if moved else []
    return [Unit(tuple(p.file.name for p in run), round(share * sum(p.bytes for p in run)),
                 [*((p.file.name, p.start, p.stop) for p in run), *also], (run, moved))
            for run in runs]

  def division(self) -> Division:
    """Returns how the documents divide; reads no more of them than it takes to see both splits.

    Raises:
      ValueError: bad input, named with file and line.
    """
    if not self.validation_fraction:
      return Division(None, 2)
    files = self.files()
    stamps = [[f.path, f.bytes, os.stat(f.path).st_mtime_ns] for f in files]
    key = digest([self.source.definition(), self.validation_fraction, stamps])
    if key not in _divisions:
      _divisions[key] = self._divide(files)
    return _divisions[key]

  def _divide(self, files: Sequence[textfiles.File]) -> Division:
    low = high = None
    for file in files:
      for document in self.source.read(textfiles.Part(file), skipped=[]):
        low = min(low or document.hash, document.hash)
        high = max(high or document.hash, document.hash)
        if (textfiles.split_of(low, self.validation_fraction)
            != textfiles.split_of(high, self.validation_fraction)):
          return Division(None, 2)
    if low is None or high is None or low == high:
      return Division(None, 0 if low is None else 1)
    # The document nearest to the other split goes there.
    held_out = textfiles.split_of(low, self.validation_fraction) == 'validation'
    return Division(high if held_out else low, 2)

  def check_held_out(self) -> None:
    """Raises ValueError if there is but one document, which cannot be divided."""
    if self.division().different == 1:
      names = ', '.join([f.name for f in self.files()][:3])
      raise ValueError(
        f'task {self.name!r} is one document ({names}), and whole documents are held '
        f"out: cut it with a separator, such as textfiles.Text.separator = '\\n\\n', or set "
        f'validation_fraction = 0 to hold nothing out')

  def read(self, parts: Iterable[textfiles.Part], *, split: str, moved: bytes | None,
           skipped: list[textfiles.Skipped]
           ) -> Iterator[tuple[textfiles.File, textfiles.Document]]:
    """Yields the documents of a split, as text.

    Args:
      parts: of the files.
      split: 'train' or 'validation'.
      moved: as in `division()`.
      skipped: what is left out is appended here.
    """
    for part in parts:
      for document in self.source.read(part, skipped=skipped):
        if textfiles.split_of(document.hash, self.validation_fraction, moved=moved) == split:
          yield part.file, document

  def documents(self, unit: Unit, *, split: str, skipped: list[textfiles.Skipped]
                ) -> Iterator[dict[str, Any]]:
    """Yields the documents of one shard as `shards.write_shard` takes them."""
    vocabulary = next(iter(self.feature_vocabularies.values()))
    parts, moved = unit.parts
    for file, document in self.read(parts, split=split, moved=moved, skipped=skipped):
      yield {'features': {name: self._tokens(text, name, vocabulary)
                          for name, text in document.texts.items()},
             'text_bytes': document.bytes, 'feature_bytes': document.feature_bytes,
             'file': file.name, 'position': document.position, 'hash': document.hash}

  def _tokens(self, text: str, feature: str, vocabulary: vocabularies.Vocabulary) -> np.ndarray:
    ids = vocabulary.encode(text)
    if feature in self.eos:
      if vocabulary.eos_id is None:
        raise ValueError(f'the vocabulary {vocabulary.path} has no token to end a document with: '
                         f'name one with eos=, or set eos=() in task {self.name!r}')
      ids.append(vocabulary.eos_id)
    return np.array(ids, np.int64)

  def sample(self, sample_bytes: int) -> Iterator[str]:
    """Yields text of the train split, from all over the files, in an order fixed by their names.

    Args:
      sample_bytes: most bytes to take; no file gives more than an eighth where there are eight.
    """
    files = sorted(self.files(), key=lambda f: hashlib.blake2b(f.name.encode()).digest())
    share = math.ceil(sample_bytes / min(len(files), 8))
    moved = self.division().moved
    for file in files:
      left = share
      for _, document in self.read([textfiles.Part(file)], split='train', moved=moved, skipped=[]):
        for text in document.texts.values():
          yield text[:left]
        left -= document.bytes
        sample_bytes -= document.bytes
        if left <= 0 or sample_bytes <= 0:
          break
      if sample_bytes <= 0:
        return


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Tasks with relative rates.

  Attributes:
    name: letters, digits and `_.:#`.
    tasks: what is mixed.
    rates: one per task, > 0; only their ratios matter.
  """

  name: str
  tasks: Sequence[Preparable]
  rates: Sequence[float]

  def __post_init__(self):
    check_name(self.name)
    if len(self.tasks) != len(self.rates) or not self.tasks:
      raise ValueError(f'mixture {self.name!r} has {len(self.tasks)} tasks and {len(self.rates)} '
                       f'rates: give one rate for each')
    for task, rate in zip(self.tasks, self.rates, strict=True):
      if not (math.isfinite(rate) and rate > 0):
        raise ValueError(f'mixture {self.name!r} has rate {rate} for {task.name!r}: it must be '
                         f'positive')

  def rate_table(self) -> dict[str, float]:
    """Returns the rate of each task by name."""
    return {t.name: float(r) for t, r in zip(self.tasks, self.rates, strict=True)}


def check_name(name: str) -> None:
  """Raises ValueError if a task or mixture cannot have this name."""
  if not _NAME.fullmatch(name) or name in ('mixtures', 'vocabularies') or name.startswith('.'):
    raise ValueError(f'{name!r} cannot name a task: use letters, digits and _ . : # and not '
                     f"'mixtures' or 'vocabularies'")


def digest(parts: Any) -> str:
  """Returns the sha256 (hex) of JSON-able parts in canonical form."""
  return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
