"""Objectives that change what a model sees: hidden tokens, spans between sentinels, prefixes.

Each works on rows as the loader assembled them and on one keyed generator per row, so that what
is hidden from row r of a source in an epoch is a pure function of the seed, as the row itself is.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

Batch = dict[str, np.ndarray]
Spec = dict[str, tuple[tuple[int, int], np.dtype]]
# What an encoder reads, and what a decoder writes about it.
Pair = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
  """What an objective needs to know of the tokens.

  Attributes:
    size: ids are in [0, size).
    sentinels: how many of the last ids no text has; the first one is size - 1, as in T5.
    pad_id: fills rows.
    bos_id: first input of a decoder.
    eos_id: last token of a document, or None.
  """

  size: int
  sentinels: int
  pad_id: int
  bos_id: int
  eos_id: int | None


class Denoising(Protocol):
  """Rows of text to the features of a batch."""

  def spec(self, batch_size: int, *, length: int) -> Spec:
    """Returns shape and dtype of each feature, for rows of `length` tokens."""
    ...

  def sentinels(self, length: int) -> int:
    """Returns how many ids that no text has are needed, for rows of `length` tokens."""
    ...

  def apply(self, batch: Batch, *, rngs: Sequence[np.random.Generator], vocabulary: Vocabulary
            ) -> Batch:
    """Returns the features of a batch; `rngs` holds one generator per row."""
    ...


def check(denoising: Denoising, vocabulary: Vocabulary, *, length: int) -> None:
  """Refuses a vocabulary in which hidden tokens could be taken for text.

  Args:
    denoising: what is hidden.
    vocabulary: of the stores.
    length: tokens per row.
  Raises:
    ValueError: it has too few sentinels; how to get them.
  """
  needed = denoising.sentinels(length)
  if needed > vocabulary.sentinels:
    raise ValueError(f'{type(denoising).__name__} needs {needed} sentinels for rows of {length} '
                     f'tokens, but the vocabulary has {vocabulary.sentinels}: prepare the stores '
                     f'with a vocabulary of extra_ids={needed} or more')


def keyed(seed: int, *, source: str, epoch: int, row: int) -> np.random.Generator:
  """The generator of one row: the same whenever, wherever and after whatever else it is made.

  Args:
    seed: of the run.
    source: name of the row's source.
    epoch: of the source.
    row: within the source.
  """
  named = '\0'.join(('denoising', str(seed), source, str(epoch), str(row)))
  digest = hashlib.blake2b(named.encode(), digest_size=16).digest()
  return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, 'little')))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedLM:
  """Some tokens of a row are hidden, and are the only targets (BERT, arXiv:1810.04805).

  Attributes:
    mask_id: stands for a hidden token; None: the first sentinel.
    rate: share of the real tokens that become targets.
    masked: share of the targets that the mask stands for.
    random: share of the targets that a random token stands for; the rest is shown as it is.
  """

  mask_id: int | None = None
  rate: float = 0.15
  masked: float = 0.8
  random: float = 0.1

  def __post_init__(self):
    if not 0 < self.rate <= 1:
      raise ValueError(f'MaskedLM.rate={self.rate} must be in (0, 1]')
    if min(self.masked, self.random) < 0 or self.masked + self.random > 1 + 1e-9:
      raise ValueError(f'MaskedLM.masked={self.masked} and random={self.random} must be at least 0 '
                       f'and at most 1 together')

  def spec(self, batch_size: int, *, length: int) -> Spec:
    """Returns shape and dtype of each feature."""
    return _spec(batch_size, '', length)

  def sentinels(self, length: int) -> int:
    """Returns 1, or 0 where the mask is given."""
    return int(self.mask_id is None)

  def apply(self, batch: Batch, *, rngs: Sequence[np.random.Generator], vocabulary: Vocabulary
            ) -> Batch:
    """Returns inputs at the places of their targets; only hidden tokens have a weight."""
    mask_id = vocabulary.size - 1 if self.mask_id is None else self.mask_id
    if not 0 <= mask_id < vocabulary.size:
      raise ValueError(f'MaskedLM.mask_id={mask_id} is not in the vocabulary of '
                       f'{vocabulary.size} tokens')
    targets = batch['targets']
    inputs, weights = targets.copy(), np.zeros_like(batch['loss_weights'])
    for row, rng in enumerate(rngs):
      real = np.flatnonzero(batch['loss_weights'][row] > 0)
      count = min(len(real), max(1, round(self.rate * len(real))))
      chosen = rng.permutation(real)[:count]
      drawn = rng.random(count)
      others = rng.integers(0, vocabulary.size - vocabulary.sentinels, count)
      shown = np.where(drawn < self.masked + self.random, others, targets[row, chosen])
      inputs[row, chosen] = np.where(drawn < self.masked, mask_id, shown)
      weights[row, chosen] = batch['loss_weights'][row, chosen]
    return {**batch, 'inputs': inputs, 'loss_weights': weights}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpanCorruption:
  """Spans are replaced by sentinels, and written after them (T5, arXiv:1910.10683, section 3.1.4).

  Attributes:
    density: share of a document's tokens that is hidden.
    mean_span: tokens of a hidden span on average.
    targets_length: tokens of a decoder row; None: as many as one document as long as a row needs.
      Documents whose targets no longer fit are left out of the row.
  """

  density: float = 0.15
  mean_span: float = 3.0
  targets_length: int | None = None

  def __post_init__(self):
    if not 0 < self.density < 1 or self.mean_span < 1:
      raise ValueError(f'SpanCorruption.density={self.density} must be in (0, 1) and mean_span='
                       f'{self.mean_span} at least 1')

  def counts(self, length: int) -> tuple[int, int]:
    """Returns the hidden tokens and the spans of a document of at least 2 tokens."""
    hidden = min(max(round(length * self.density), 1), length - 1)
    spans = min(max(round(hidden / self.mean_span), 1), hidden, length - hidden)
    return hidden, spans

  def spec(self, batch_size: int, *, length: int) -> Spec:
    """Returns shape and dtype of each feature."""
    return _pair_spec(batch_size, length=length, written=self.written(length))

  def sentinels(self, length: int) -> int:
    """Returns the spans of one document as long as a row."""
    return self.counts(max(length, 2))[1]

  def written(self, length: int) -> int:
    """Returns the length of a decoder row."""
    return self.targets_length or sum(self.counts(max(length, 2))) + 1

  def apply(self, batch: Batch, *, rngs: Sequence[np.random.Generator], vocabulary: Vocabulary
            ) -> Batch:
    """Returns what an encoder reads and a decoder writes."""
    make = lambda tokens, row: self.pair(tokens, rngs[row], first=vocabulary.size - 1)
    return _pairs(batch, make, vocabulary=vocabulary,
                  written=self.written(batch['targets'].shape[1]))

  def pair(self, tokens: np.ndarray, rng: np.random.Generator, *, first: int) -> Pair:
    """Splits one document.

    Args:
      tokens: int32 [n], n at least 2.
      rng: of its row.
      first: id of the first sentinel; those of later spans are below it.
    """
    hidden, spans = self.counts(len(tokens))
    sizes = np.stack([_segmentation(len(tokens) - hidden, spans, rng),
                      _segmentation(hidden, spans, rng)], 1).reshape(-1)
    pieces = np.split(tokens, np.cumsum(sizes)[:-1])
    sentinels = np.arange(first, first - spans, -1, dtype=tokens.dtype)[:, None]
    read = [part for kept, mark in zip(pieces[::2], sentinels, strict=True)
            for part in (kept, mark)]
    write = [part for mark, gone in zip(sentinels, pieces[1::2], strict=True)
             for part in (mark, gone)]
    return np.concatenate(read), np.concatenate(write)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixLM:
  """An encoder reads the beginning of a document, a decoder writes the rest.

  Attributes:
    share: of a document that is read on average: the cut is uniform around it, as far as it can
      be within (0, 1).
    targets_length: as of `SpanCorruption`; None: as long as the row.
  """

  share: float = 0.5
  targets_length: int | None = None

  def __post_init__(self):
    if not 0 < self.share < 1:
      raise ValueError(f'PrefixLM.share={self.share} must be in (0, 1)')

  def spec(self, batch_size: int, *, length: int) -> Spec:
    """Returns shape and dtype of each feature."""
    return _pair_spec(batch_size, length=length, written=self.written(length))

  def sentinels(self, length: int) -> int:
    """Returns 0."""
    del length
    return 0

  def written(self, length: int) -> int:
    """Returns the length of a decoder row."""
    return self.targets_length or length

  def apply(self, batch: Batch, *, rngs: Sequence[np.random.Generator], vocabulary: Vocabulary
            ) -> Batch:
    """Returns what an encoder reads and a decoder writes."""
    make = lambda tokens, row: self.pair(tokens, rngs[row], first=0)
    return _pairs(batch, make, vocabulary=vocabulary,
                  written=self.written(batch['targets'].shape[1]))

  def pair(self, tokens: np.ndarray, rng: np.random.Generator, *, first: int) -> Pair:
    """Splits one document of at least 2 tokens; it has no sentinels, so `first` is not used."""
    del first
    around = min(self.share, 1 - self.share)
    at = round(len(tokens) * (self.share + around * (2 * rng.random() - 1)))
    at = min(max(at, 1), len(tokens) - 1)
    return tokens[:at], tokens[at:]


# Of UL2 (arXiv:2205.05131, table 1): regular, extreme, sequential.
UL2 = (SpanCorruption(density=0.15, mean_span=3), SpanCorruption(density=0.15, mean_span=8),
       SpanCorruption(density=0.5, mean_span=3), SpanCorruption(density=0.5, mean_span=8),
       SpanCorruption(density=0.15, mean_span=64), SpanCorruption(density=0.5, mean_span=64),
       PrefixLM())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
  """Each row is denoised in one of several ways (UL2, arXiv:2205.05131).

  Attributes:
    denoisers: the ways; UL2's seven by default.
    weights: how often each is taken; empty: equally often.
    modes: token put before what is read, one per way, so that the model knows which; empty: none.
  """

  denoisers: tuple[SpanCorruption | PrefixLM, ...] = UL2
  weights: tuple[float, ...] = ()
  modes: tuple[int, ...] = ()

  def __post_init__(self):
    for name in ('denoisers', 'weights', 'modes'):
      object.__setattr__(self, name, tuple(getattr(self, name)))
    for name in ('weights', 'modes'):
      given = getattr(self, name)
      if given and len(given) != len(self.denoisers):
        raise ValueError(f'Mixture.{name} has {len(given)} entries for {len(self.denoisers)} '
                         f'denoisers')
    if not self.denoisers or min(self.weights, default=1) < 0 or (
        self.weights and not sum(self.weights)):
      raise ValueError('Mixture needs denoisers, with weights of at least 0, not all 0')

  def spec(self, batch_size: int, *, length: int) -> Spec:
    """Returns shape and dtype of each feature."""
    return _pair_spec(batch_size, length=length, written=self._written(length))

  def sentinels(self, length: int) -> int:
    """Returns the most that one of the ways needs."""
    return max(one.sentinels(length) for one in self.denoisers)

  def _written(self, length: int) -> int:
    return max(one.written(length) for one in self.denoisers)

  def apply(self, batch: Batch, *, rngs: Sequence[np.random.Generator], vocabulary: Vocabulary
            ) -> Batch:
    """Returns what an encoder reads and a decoder writes."""
    shares = np.array(self.weights or [1.0] * len(self.denoisers))
    ways = [int(rng.choice(len(shares), p=shares / shares.sum())) for rng in rngs]

    def make(tokens: np.ndarray, row: int) -> Pair:
      way = ways[row]
      read, write = self.denoisers[way].pair(tokens, rngs[row], first=vocabulary.size - 1)
      mode = [self.modes[way]] if self.modes else []
      return np.concatenate([np.array(mode, read.dtype), read]), write

    return _pairs(batch, make, vocabulary=vocabulary,
                  written=self._written(batch['targets'].shape[1]))


def _segmentation(items: int, segments: int, rng: np.random.Generator) -> np.ndarray:
  """Sizes, each at least 1, of a random split of items."""
  cuts = np.sort(rng.permutation(items - 1)[:segments - 1]) + 1
  return np.diff(np.concatenate([[0], cuts, [items]]))


def _spec(batch_size: int, prefix: str, length: int) -> Spec:
  names = ('inputs', 'segment_ids', 'positions')
  shape = (batch_size, length)
  spec = {prefix + name: (shape, np.dtype(np.int32)) for name in names}
  if prefix:
    return spec
  return {**spec, 'targets': (shape, np.dtype(np.int32)),
          'loss_weights': (shape, np.dtype(np.float32))}


def _pair_spec(batch_size: int, *, length: int, written: int) -> Spec:
  return {**_spec(batch_size, 'encoder_', length), **_spec(batch_size, '', written)}


def _pairs(batch: Batch, make: Callable[[np.ndarray, int], Pair], *, vocabulary: Vocabulary,
           written: int) -> Batch:
  """Splits the documents of each row and packs both sides under the same segment numbers."""
  rows, length = batch['targets'].shape
  spec = _pair_spec(rows, length=length, written=written)
  out = {name: np.zeros(shape, dtype) for name, (shape, dtype) in spec.items()}
  for name in ('encoder_inputs', 'inputs', 'targets'):
    out[name][:] = vocabulary.pad_id
  for row in range(rows):
    segments, at, to, number = batch['segment_ids'][row], 0, 0, 0
    for document in range(1, int(segments.max(initial=0)) + 1):
      tokens = batch['targets'][row][segments == document]
      end = [] if vocabulary.eos_id is None else [vocabulary.eos_id]
      if end and len(tokens) and tokens[-1] == end[0]:
        tokens = tokens[:-1]
      if len(tokens) < 2:
        continue
      read, write = (np.concatenate([part, np.array(end, part.dtype)])
                     for part in make(tokens, row))
      if at + len(read) > length or to + len(write) > written:
        continue
      number += 1
      here, there = slice(at, at + len(read)), slice(to, to + len(write))
      at, to = here.stop, there.stop
      out['encoder_inputs'][row, here], out['targets'][row, there] = read, write
      out['inputs'][row, there] = np.concatenate([[vocabulary.bos_id], write[:-1]])
      for name, place in (('encoder_', here), ('', there)):
        out[f'{name}segment_ids'][row, place] = number
        out[f'{name}positions'][row, place] = np.arange(place.stop - place.start)
      out['loss_weights'][row, there] = 1
  return out
