"""Objectives that change what a model sees: hidden tokens, spans between sentinels, prefixes.

Each works on rows as the loader assembled them and on one keyed generator per row, so that what
is hidden from row r of a source in an epoch is a pure function of the seed, as the row itself is.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from t5x_like.data import pairs
from t5x_like.data import store as store_lib

Batch = pairs.Batch
Spec = pairs.Spec
Pair = pairs.Pair
Vocabulary = pairs.Vocabulary


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


def vocabulary_of(stores: Mapping[str, store_lib.Store], *, denoising: Denoising, length: int
                  ) -> Vocabulary:
  """Returns the vocabulary of stores, unless hidden tokens could be taken for text in it.

  Args:
    stores: by source, all of one vocabulary.
    denoising: what is hidden.
    length: tokens per row.
  Raises:
    ValueError: it has too few sentinels or no mask; how to get them.
  """
  vocabulary = pairs.vocabulary_of(stores)
  masks = isinstance(denoising, MaskedLM)
  needed = 0 if masks and vocabulary.mask_id is not None else denoising.sentinels(length)
  if needed <= vocabulary.sentinels:
    return vocabulary
  store, kind = next(iter(stores.values())).path, type(denoising).__name__
  lacks = (f'{kind} needs a token that stands for a hidden one, but the vocabulary of {store} has '
           f'neither a mask nor sentinels' if masks else
           f'{kind} needs {needed} sentinels for rows of {length} tokens, but the vocabulary of '
           f'{store} has {vocabulary.sentinels}')
  raise ValueError(f'{lacks}: prepare the text again under another TASK or STORE_DIR with '
                   f'--gin.EXTRA_IDS={needed} or more (prepare.prepare.extra_ids)'
                   + ('; or, if one of its tokens is a mask, set MASK_ID to its id' if masks else
                      ', or shorten LENGTH'))


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
    mask_id: stands for a hidden token; None: the vocabulary's own mask, as a published one may
      name it, else the first sentinel.
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
    return pairs.row_spec(batch_size, length=length)

  def sentinels(self, length: int) -> int:
    """Returns 1, or 0 where the mask is given."""
    del length
    return int(self.mask_id is None)

  def apply(self, batch: Batch, *, rngs: Sequence[np.random.Generator], vocabulary: Vocabulary
            ) -> Batch:
    """Returns inputs at the places of their targets; only hidden tokens have a weight."""
    first = vocabulary.size - 1
    known = first if vocabulary.mask_id is None else vocabulary.mask_id
    mask_id = known if self.mask_id is None else self.mask_id
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
    return pairs.pair_spec(batch_size, length=length, written=self.written(length))

  def sentinels(self, length: int) -> int:
    """Returns the spans of one document as long as a row."""
    return self.counts(max(length, 2))[1]

  @property
  def name(self) -> str:
    """Tells it from others of a mixture, as 'span_0.15_3'."""
    return f'span_{self.density:g}_{self.mean_span:g}'

  def written(self, length: int) -> int:
    """Returns the length of a decoder row."""
    return self.targets_length or sum(self.counts(max(length, 2))) + 1

  def apply(self, batch: Batch, *, rngs: Sequence[np.random.Generator], vocabulary: Vocabulary
            ) -> Batch:
    """Returns what an encoder reads and a decoder writes."""
    make = lambda tokens, row: self.pair(tokens, rngs[row], first=vocabulary.size - 1)
    return pairs.pack(batch, make, vocabulary=vocabulary,
                  written=self.written(batch['targets'].shape[1]))

  def pair(self, tokens: np.ndarray, rng: np.random.Generator, *, first: int) -> Pair:
    """Splits one document.

    Args:
      tokens: int32 [n], n at least 2.
      rng: of its row.
      first: id of the first sentinel; those of later spans are below it.
    """
    hidden, spans = self.counts(len(tokens))
    sizes = np.stack([pairs.segmentation(len(tokens) - hidden, spans, rng),
                      pairs.segmentation(hidden, spans, rng)], 1).reshape(-1)
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
    return pairs.pair_spec(batch_size, length=length, written=self.written(length))

  def sentinels(self, length: int) -> int:
    """Returns 0."""
    del length
    return 0

  @property
  def name(self) -> str:
    """Tells it from others of a mixture, as 'prefix_0.5'."""
    return f'prefix_{self.share:g}'

  def written(self, length: int) -> int:
    """Returns the length of a decoder row."""
    return self.targets_length or length

  def apply(self, batch: Batch, *, rngs: Sequence[np.random.Generator], vocabulary: Vocabulary
            ) -> Batch:
    """Returns what an encoder reads and a decoder writes."""
    make = lambda tokens, row: self.pair(tokens, rngs[row], first=0)
    return pairs.pack(batch, make, vocabulary=vocabulary,
                  written=self.written(batch['targets'].shape[1]))

  def pair(self, tokens: np.ndarray, rng: np.random.Generator, *, first: int) -> Pair:
    """Splits one document of at least 2 tokens; it has no sentinels, so `first` is not used."""
    del first
    at = _cut(len(tokens), self.share, rng)
    return tokens[:at], tokens[at:]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderPrefixLM:
  """One stack reads the beginning of each document in both directions and writes the rest.

  T5's prefix LM (arXiv:1910.10683, section 3.2.1), packed as `seqio.PrefixLMFeatureConverter` does:
  the token that begins a document belongs to its prefix, and targets are those after it.

  Attributes:
    share: of a document that is read on average, as of `PrefixLM`; None: the inputs of stores that
      have inputs and targets.
  """

  share: float | None = 0.5

  def __post_init__(self):
    if self.share is not None and not 0 < self.share < 1:
      raise ValueError(f'DecoderPrefixLM.share={self.share} must be in (0, 1), or None for the '
                       f'inputs that the stores have')

  def spec(self, batch_size: int, *, length: int) -> Spec:
    """Returns shape and dtype of each feature."""
    return {**pairs.row_spec(batch_size, length=length),
            'prefix': ((batch_size, length), np.dtype(np.int32))}

  def sentinels(self, length: int) -> int:
    """Returns 0."""
    del length
    return 0

  def apply(self, batch: Batch, *, rngs: Sequence[np.random.Generator], vocabulary: Vocabulary
            ) -> Batch:
    """Returns the batch with `prefix`, 1 for what is seen in both directions and has no weight."""
    del vocabulary
    prefix, weights = np.zeros_like(batch['inputs']), batch['loss_weights'].copy()
    for row, rng in enumerate(rngs):
      segments = batch['segment_ids'][row]
      for document in range(1, int(segments.max(initial=0)) + 1):
        places = np.flatnonzero(segments == document)
        scored = np.flatnonzero(weights[row, places] > 0)
        if self.share is not None:
          at = _cut(len(places), self.share, rng) if len(places) > 1 else 0
        else:
          at = int(scored[0]) if len(scored) else len(places)
        # The input of the first target is the last token of the prefix.
        prefix[row, places[:at + 1] if at else []] = 1
        weights[row, places[:at]] = 0
    return {**batch, 'prefix': prefix, 'loss_weights': weights}


def _cut(length: int, share: float, rng: np.random.Generator) -> int:
  """How many of at least 2 tokens are read: uniform around the share, at least 1 on each side."""
  around = min(share, 1 - share)
  return min(max(round(length * (share + around * (2 * rng.random() - 1))), 1), length - 1)


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
    return pairs.pair_spec(batch_size, length=length, written=self._written(length))

  def sentinels(self, length: int) -> int:
    """Returns the most that one of the ways needs."""
    return max(one.sentinels(length) for one in self.denoisers)

  def ways(self, length: int) -> dict[str, tuple[float, 'Mixture']]:
    """Returns each way by its name: its share of the rows, and itself, in rows as long as these.

    Args:
      length: tokens per row.
    """
    shares, modes = self._shares(), self.modes or (None,) * len(self.denoisers)
    found: dict[str, tuple[float, Mixture]] = {}
    for share, one, mode in zip(shares.tolist(), self.denoisers, modes, strict=True):
      alone = dataclasses.replace(one, targets_length=self._written(length))
      name = one.name if one.name not in found else f'{one.name}_{len(found)}'
      if share:
        found[name] = share, Mixture(denoisers=(alone,), modes=() if mode is None else (mode,))
    return found

  def _shares(self) -> np.ndarray:
    weights = np.array(self.weights or [1.0] * len(self.denoisers))
    return weights / weights.sum()

  def _written(self, length: int) -> int:
    return max(one.written(length) for one in self.denoisers)

  def apply(self, batch: Batch, *, rngs: Sequence[np.random.Generator], vocabulary: Vocabulary
            ) -> Batch:
    """Returns what an encoder reads and a decoder writes."""
    shares = self._shares()
    ways = [int(rng.choice(len(shares), p=shares)) for rng in rngs]

    def make(tokens: np.ndarray, row: int) -> Pair:
      way = ways[row]
      read, write = self.denoisers[way].pair(tokens, rngs[row], first=vocabulary.size - 1)
      mode = [self.modes[way]] if self.modes else []
      return np.concatenate([np.array(mode, read.dtype), read]), write

    return pairs.pack(batch, make, vocabulary=vocabulary,
                  written=self._written(batch['targets'].shape[1]))
