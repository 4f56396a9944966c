"""Bounded access to the files of token stores: descriptors, memory maps and flat token arrays.

Tokens are read with pread rather than through a memory map, so that resident memory does not grow
with what has been read; tables are mapped, under a limit of mapped bytes shared by all stores.
"""

import collections
import os
import threading
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import DTypeLike


class Descriptor:
  """An open file, closed when the last reference to it is dropped."""

  __slots__ = ('fd',)

  def __init__(self, path: str):
    self.fd = -1
    self.fd = os.open(path, os.O_RDONLY | getattr(os, 'O_CLOEXEC', 0))

  def __del__(self, close=os.close):  # Bound now: at exit the module may be gone before this.
    if self.fd >= 0:
      close(self.fd)


class Files:
  """Least-recently-used cache of descriptors and memory maps, safe to share between threads.

  Args:
    max_open: most descriptors plus maps held open at once, > 0.
    max_mapped: most bytes of tables mapped at once; one table is always kept.
  """

  def __init__(self, *, max_open: int = 128, max_mapped: int = 256 << 20):
    self._max_open = max_open
    self._max_mapped = max_mapped
    self._mapped = 0
    self._entries: collections.OrderedDict[Hashable, Descriptor | np.ndarray] = (
      collections.OrderedDict())
    self._lock = threading.Lock()

  def descriptor(self, path: str) -> Descriptor:
    """Returns the open file at path; keep the object for as long as its fd is used."""
    with self._lock:
      found = self._entries.get(path)
      if isinstance(found, Descriptor):
        self._entries.move_to_end(path)
        return found
      opened = Descriptor(path)
      self._entries[path] = opened
      self._evict()
      return opened

  def table(self, path: str, *, dtype: DTypeLike, width: int = 1) -> np.ndarray:
    """Returns the file at path as a read-only array [n] of dtype ([n, width] if width > 1)."""
    key = (path, 'table')
    with self._lock:
      found = self._entries.get(key)
      if isinstance(found, np.ndarray):
        self._entries.move_to_end(key)
        return found
      empty = os.path.getsize(path) == 0
      array = np.empty(0, dtype) if empty else np.asarray(np.memmap(path, dtype=dtype, mode='r'))
      array = array.reshape(-1, width) if width > 1 else array
      self._entries[key] = array
      self._mapped += array.nbytes
      self._evict()
      return array

  def __len__(self) -> int:
    return len(self._entries)

  def _evict(self) -> None:
    while len(self._entries) > self._max_open or (
        self._mapped > self._max_mapped and len(self._entries) > 1):
      _, dropped = self._entries.popitem(last=False)
      if isinstance(dropped, np.ndarray):
        self._mapped -= dropped.nbytes


class FlatTokens:
  """The shards of one feature as one flat read-only array.

  Args:
    files: cache of open files.
    paths: shard files in canonical order, raw little-endian tokens.
    counts: tokens in each shard.
    dtype: uint16 or uint32.
  """

  def __init__(self, files: Files, *, paths: Sequence[str], counts: Sequence[int],
               dtype: DTypeLike):
    self._files = files
    self._paths = list(paths)
    self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)
    self.dtype = np.dtype(dtype)
    self.shape = (int(self._starts[-1]),)

  def __len__(self) -> int:
    return self.shape[0]

  def __getitem__(self, key: int | slice) -> np.ndarray | int:
    if not isinstance(key, slice):
      index = range(len(self))[key]
      return int(self.read(np.array([index]), lengths=np.array([1]))[0])
    start, stop, stride = key.indices(len(self))
    if stride != 1:
      raise ValueError(f'token slices have step 1, got {stride}: slice first, then stride')
    return self.read(np.array([start]), lengths=np.array([max(stop - start, 0)]))

  def read(self, starts: np.ndarray, *, lengths: np.ndarray) -> np.ndarray:
    """Reads ranges of the flat array, one after the other.

    Args:
      starts: int64 [k], first token of each range.
      lengths: int64 [k], tokens of each range, >= 0.

    Returns:
      dtype [sum(lengths)].

    Raises:
      ValueError: a shard is shorter than the manifest says.
    """
    out = np.empty(int(lengths.sum()), self.dtype)
    buffer = out.view(np.uint8).data
    shards = np.searchsorted(self._starts, starts, side='right') - 1
    size = self.dtype.itemsize
    opened: dict[int, Descriptor] = {}
    done = 0
    for start, count, shard in zip(starts.tolist(), lengths.tolist(), shards.tolist(), strict=True):
      while count > 0:
        first, last = int(self._starts[shard]), int(self._starts[shard + 1])
        take = min(count, last - start)
        if take > 0:
          if shard not in opened:
            opened[shard] = self._files.descriptor(self._paths[shard])
          got = os.preadv(opened[shard].fd, [buffer[done:done + take * size]],
                          (start - first) * size)
          if got != take * size:
            raise ValueError(
              f'{self._paths[shard]} is truncated: it ends before token {start - first + take}; '
              f'delete this store and rerun prepare')
          done += got
          start += take
          count -= take
        shard += 1
    return out
