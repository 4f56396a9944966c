"""Which row of which source is row g of the run: arithmetic, forward and backward.

Nothing is drawn from a running generator, so any row of a run costs the same to find, on any number
of processes. The rows of a run fall into periods. A keyed permutation of a period deals its places
to the sources in exact numbers; a source's rows are counted over its places, so that it is read
strictly epoch by epoch, each epoch in an order of its own.

The shuffle is a generalised Feistel network over Z_a x Z_b, the least a * b >= n near the square,
with cycle walking down to [0, n) (Black & Rogaway, "Ciphers with arbitrary finite domains", 2002).
A power of four would waste up to three walks in four; this wastes less than one in sqrt(n). The
round function is the finaliser of splitmix64 (Steele et al., 2014): it spreads, it hides nothing.
"""

import bisect
import dataclasses
import difflib
import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

ROUNDS = 8
_ONE = np.uint64(1)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def derive_key(*parts: object) -> np.ndarray:
  """Returns a key, uint64 [4], that depends on every part and on nothing else."""
  text = '\0'.join(f'{len(str(p))}:{p}' for p in parts)
  return np.frombuffer(hashlib.sha256(text.encode()).digest(), '<u8').astype(np.uint64)


def permute(index: np.ndarray, *, size: np.ndarray | int, key: np.ndarray,
            tweak: np.ndarray | int = 0,
            direction: Literal['forward', 'backward'] = 'forward') -> np.ndarray:
  """Maps [0, size) onto itself, in an order that looks random and can be inverted at any point.

  Args:
    index: int64 [...], 0 <= index < size.
    size: int64, broadcast against index, 1 <= size < 2**52.
    key: uint64 [..., 4] from `derive_key`; leading dims broadcast against index.
    tweak: int64 >= 0, broadcast against index; each value gives another permutation (the epoch).
    direction: 'backward' for the inverse map.

  Returns:
    int64 [...].
  """
  arrays = np.broadcast_arrays(index, size, tweak, *np.moveaxis(key, -1, 0))
  shape = arrays[0].shape
  # One dimension at least: numpy warns of wrapping multiplication for scalars only.
  value, n, tweaks, *words = (np.ravel(a).astype(np.uint64) for a in arrays)
  assert np.all(value < n) and np.all(n < 1 << 52)
  keys = _round_keys(words, tweaks)
  a = np.ceil(np.sqrt(n.astype(np.float64))).astype(np.uint64)
  b = (n + a - _ONE) // a
  step = _forward if direction == 'forward' else _backward
  out = step(value, a=a, b=b, keys=keys)
  todo = np.flatnonzero(out >= n)
  while len(todo):
    out[todo] = step(out[todo], a=a[todo], b=b[todo], keys=[k[todo] for k in keys])
    todo = todo[out[todo] >= n[todo]]
  return out.astype(np.int64).reshape(shape)


def _mix(x: np.ndarray) -> np.ndarray:
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


def _round_keys(words: Sequence[np.ndarray], tweak: np.ndarray) -> list[np.ndarray]:
  seeds = _mix(_mix(tweak * _GOLDEN + words[0]) + words[1])
  steps = [np.array([(i + 1) * int(_GOLDEN) % 2**64], np.uint64) for i in range(ROUNDS)]
  return [_mix(seeds + step + words[2 + i % 2]) for i, step in enumerate(steps)]


def _forward(value: np.ndarray, *, a: np.ndarray, b: np.ndarray,
             keys: Sequence[np.ndarray]) -> np.ndarray:
  left, right = value // b, value % b
  for i in range(0, ROUNDS, 2):
    left = (left + (_mix(right + keys[i]) >> _ONE)) % a
    right = (right + (_mix(left + keys[i + 1]) >> _ONE)) % b
  return left * b + right


def _backward(value: np.ndarray, *, a: np.ndarray, b: np.ndarray,
              keys: Sequence[np.ndarray]) -> np.ndarray:
  left, right = value // b, value % b
  for i in reversed(range(0, ROUNDS, 2)):
    right = (right + b - (_mix(left + keys[i + 1]) >> _ONE) % b) % b
    left = (left + a - (_mix(right + keys[i]) >> _ONE) % a) % a
  return left * b + right


def apportion(shares: Mapping[str, float], *, total: int) -> dict[str, int]:
  """Divides a total in proportion to shares, by largest remainders.

  Args:
    shares: by name, >= 0, not all 0.
    total: to divide, >= 0.

  Returns:
    Whole numbers summing to total, in the order of the names.
  """
  names = sorted(shares)
  whole = math.fsum(shares.values())
  exact = {n: shares[n] / whole * total for n in names}
  parts = {n: int(exact[n]) for n in names}
  by_remainder = sorted(names, key=lambda n: (parts[n] - exact[n], n))
  for name in by_remainder[:total - sum(parts.values())]:
    parts[name] += 1
  return parts


def quantise(rates: Mapping[str, float], *, total: int) -> dict[str, int]:
  """Turns rates into whole rows per period by largest remainders.

  Args:
    rates: per source, >= 0, not all 0.
    total: rows in one period, > 0.

  Returns:
    Rows per source, summing to total, in the order of the names.

  Raises:
    ValueError: no usable rate, or a source with a positive rate would get no row.
  """
  for name, rate in rates.items():
    if not (np.isfinite(rate) and rate >= 0):
      raise ValueError(f'the rate of source {name!r} is {rate}: rates are finite and >= 0')
  names = sorted(rates)
  whole = math.fsum(rates.values())
  if whole <= 0:
    raise ValueError(f'no source has a positive rate: {dict(rates)}; give at least one')
  rows = apportion(rates, total=total)
  lost = [n for n in names if rates[n] > 0 and rows[n] == 0]
  if lost:
    needed = int(np.ceil(max(whole / rates[n] for n in lost)))
    raise ValueError(
      f'source {lost[0]!r} with rate {rates[lost[0]]} would get 0 of the {total} rows of a period'
      f'{f" ({len(lost)} sources would)" if len(lost) > 1 else ""}; set period to {needed} or '
      f'more, raise its rate, or leave it out')
  return rows


@dataclasses.dataclass(frozen=True)
class Phase:
  """A stretch of periods with constant rates.

  Attributes:
    first: first period of the phase.
    counts: int64 [S], rows of each source in one period.
    ordinals: int64 [S], rows of each source before the phase.
  """

  first: int
  counts: np.ndarray
  ordinals: np.ndarray


class Order:
  """The order of rows of a mixture.

  Args:
    sizes: rows in one epoch of each source, > 0.
    keys: what identifies each source's content (its fingerprint), for its shuffle.
    rates: per step at which they begin (the first is 0), the rates of the sources from there on; a
      source left out has rate 0. They take effect at the first period that begins at or after it.
    batch_size: rows per step.
    period: rows over which the rates hold exactly.
    seed: of the shuffles and of the mixing.

  Raises:
    ValueError: for rates that cannot be met, or changes that fall into the same period.
  """

  def __init__(self, *, sizes: Mapping[str, int], keys: Mapping[str, str],
               rates: Mapping[int, Mapping[str, float]], batch_size: int, period: int, seed: int):
    self.names = tuple(sorted(sizes))
    self.batch_size = batch_size
    self.period = period
    self._sizes = np.array([sizes[n] for n in self.names], np.int64)
    self._keys = np.stack([derive_key('rows', seed, n, keys[n]) for n in self.names])
    self._mix_key = derive_key('mixture', seed)
    self.phases = self._make_phases(rates)
    self._draw = functools.lru_cache(maxsize=4)(self._make_draw)

  def rows(self, g: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns what rows g of the run are.

    Args:
      g: int64 [n], >= 0; step k holds rows [k * batch_size, (k + 1) * batch_size).

    Returns:
      source (index into names), epoch, row within the source; int64 [n] each.
    """
    source, ordinal = self._ordinals(np.asarray(g, np.int64))
    size = self._sizes[source]
    epoch = ordinal // size
    row = permute(ordinal % size, size=size, key=self._keys[source], tweak=epoch)
    return source, epoch, row

  def find(self, name: str, *, rows: np.ndarray, epochs: np.ndarray) -> np.ndarray:
    """Returns where rows of a source are in the run: the inverse of `rows`.

    Args:
      name: source.
      rows: int64 [n], rows within the source.
      epochs: int64 [n], epoch of each.

    Returns:
      int64 [n], row of the run, -1 where the last phase has ended with the source before that.
    """
    s = self.names.index(name)
    size = self._sizes[s]
    inner = permute(np.asarray(rows, np.int64), size=size, key=self._keys[s], tweak=epochs,
                    direction='backward')
    ordinal = np.asarray(epochs, np.int64) * size + inner
    out = np.full(ordinal.shape, -1, np.int64)
    for i, phase in enumerate(self.phases):
      count = phase.counts[s]
      if count == 0:
        continue
      inside = ordinal >= phase.ordinals[s]
      if i + 1 < len(self.phases):
        inside &= ordinal < self.phases[i + 1].ordinals[s]
      later, rank = np.divmod(ordinal[inside] - phase.ordinals[s], count)
      periods, slot = phase.first + later, phase.counts[:s].sum() + rank
      place = np.empty_like(slot)
      for q in np.unique(periods).tolist():
        place[periods == q] = self._draw(q)[2][slot[periods == q]]
      out[inside] = periods * self.period + place
    return out

  def consumed(self, g: int) -> dict[str, int]:
    """Returns how many rows of each source come before row g of the run."""
    q, p = divmod(g, self.period)
    phase = self._phase(q)
    whole = phase.ordinals + (q - phase.first) * phase.counts
    source, _ = self._ordinals(np.arange(g - p, g, dtype=np.int64))
    part = np.bincount(source, minlength=len(self.names))
    return dict(zip(self.names, (whole + part).tolist(), strict=True))

  def _ordinals(self, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    periods, p = np.divmod(g, self.period)
    source, ordinal = np.empty_like(g), np.empty_like(g)
    for q in np.unique(periods).tolist():
      phase, here = self._phase(q), periods == q
      found, rank, _ = self._draw(q)
      s = found[p[here]]
      source[here] = s
      ordinal[here] = phase.ordinals[s] + (q - phase.first) * phase.counts[s] + rank[p[here]]
    return source, ordinal

  def _phase(self, q: int) -> Phase:
    return self.phases[bisect.bisect([f.first for f in self.phases], q) - 1]

  def _make_draw(self, q: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns, for period q, by place: source and rank in it; and the places by source and rank."""
    ends = np.cumsum(self._phase(q).counts)
    slot = permute(np.arange(self.period), size=self.period, key=self._mix_key, tweak=q)
    source = np.searchsorted(ends, slot, side='right').astype(np.int32)
    places = np.argsort(source, kind='stable').astype(np.int32)
    rank = np.empty(self.period, np.int32)
    begin = np.concatenate([[0], ends[:-1]])
    rank[places] = np.arange(self.period) - begin[source[places]]
    return source, rank, places

  def _make_phases(self, rates: Mapping[int, Mapping[str, float]]) -> tuple[Phase, ...]:
    phases: list[Phase] = []
    for step, given in sorted(rates.items()):
      check_names(given, known=self.names)
      full = {n: float(given.get(n, 0.0)) for n in self.names}
      quantised = quantise(full, total=self.period)
      counts = np.array([quantised[n] for n in self.names], np.int64)
      first = -(-step * self.batch_size // self.period)
      ordinals = np.zeros_like(counts)
      if phases:
        last = phases[-1]
        if first <= last.first:
          raise ValueError(
            f'the rates given for step {step} would begin in the same period of {self.period} rows '
            f'as those before them, which then have no effect; use a smaller period or a later '
            f'step')
        ordinals = last.ordinals + (first - last.first) * last.counts
      phases.append(Phase(first=first, counts=counts, ordinals=ordinals))
    assert phases and phases[0].first == 0
    return tuple(phases)


def check_names(given: Mapping[str, float], *, known: Sequence[str]) -> None:
  """Raises ValueError, with the nearest right name, if a source is not one of those known."""
  for name in given:
    if name not in known:
      near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
      raise ValueError(f'unknown source {name!r}; did you mean {near[0]!r}? sources are: '
                       f'{", ".join(known)}')
