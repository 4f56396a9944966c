"""Packing whole documents into rows: best-fit decreasing over the table of lengths alone.

Documents of equal length are interchangeable to the packer, so it works on the histogram of lengths
and the cost does not grow with the number of documents (Krell et al., "Efficient Sequence Packing
without Cross-contamination", 2021, whose shortest-pack-first this replaces by best fit).
"""

import bisect
import collections
import contextlib
import dataclasses
import os
from collections.abc import Callable

import numpy as np

from t5x_like.data import files as files_lib
from t5x_like.data import order, shards
from t5x_like.data.streams import Stream, ragged_arange

VERSION = 1
PIECE = np.dtype([('document', '<i8'), ('start', '<u4'), ('length', '<u4')])
_Group = tuple[tuple[tuple[int, int], ...], int]


@dataclasses.dataclass(frozen=True)
class Plan:
  """Which pieces of documents make up each row.

  Attributes:
    rows: number of rows.
    bounds: gives int64 [rows + 1], row r is pieces [bounds[r], bounds[r + 1]).
    pieces: gives PIECE [n].
    path: file the plan is kept in; None if the store's directory cannot be written.
  """

  rows: int
  bounds: Callable[[], np.ndarray]
  pieces: Callable[[], np.ndarray]
  path: str | None


def load(stream: Stream, *, length: int) -> Plan:
  """Returns the plan of a stream, kept beside its store once it has been computed.

  Args:
    stream: of the source.
    length: tokens per row, > 0.
  """
  store = stream.store
  stem = os.path.join(store.path, f'plan.{store.fingerprint[:16]}.pack{VERSION}.{length}')
  paths = {'bounds': f'{stem}.bounds.bin', 'pieces': f'{stem}.pieces.bin'}
  if not _is_whole(paths):
    bounds, pieces = compute(stream.lengths(), length=length)
    if not _write(paths, bounds=bounds, pieces=pieces):
      return Plan(rows=len(bounds) - 1, bounds=lambda: bounds, pieces=lambda: pieces, path=None)
  rows = os.path.getsize(paths['bounds']) // 8 - 1
  files: files_lib.Files = store.files
  return Plan(rows=rows, path=paths['pieces'],
              bounds=lambda: files.table(paths['bounds'], dtype=np.int64),
              pieces=lambda: files.table(paths['pieces'], dtype=PIECE))


def compute(lengths: np.ndarray, *, length: int) -> tuple[np.ndarray, np.ndarray]:
  """Packs documents into rows.

  Args:
    lengths: int64 [documents], tokens of each document.
    length: tokens per row, > 0; longer documents are cut into chunks of this length and a rest.

  Returns:
    bounds int64 [rows + 1] and PIECE [n], every token of every document in exactly one piece.
  """
  counts = -(-lengths // length)
  document = np.repeat(np.arange(len(lengths)), counts)
  start = ragged_arange(counts) * length
  size = np.minimum(lengths[document] - start, length)
  # Among pieces of one length the order is scattered: neighbours in a file should not share a row.
  scatter = order.permute(np.arange(len(size)), size=max(len(size), 1),
                          key=order.derive_key('plan'))
  by_size = np.lexsort((scatter, size))
  histogram = np.bincount(size, minlength=length + 1)
  taken = np.cumsum(histogram) - histogram
  chosen: list[np.ndarray] = []
  per_row: list[np.ndarray] = []
  for pattern, rows in best_fit(histogram, length=length):
    columns = []
    for piece, copies in pattern:
      columns.append(by_size[taken[piece]:taken[piece] + rows * copies].reshape(rows, copies))
      taken[piece] += rows * copies
    block = np.concatenate(columns, axis=1)
    chosen.append(block.reshape(-1))
    per_row.append(np.full(rows, block.shape[1], np.int64))
  index = np.concatenate([np.zeros(0, np.int64), *chosen])
  pieces = np.empty(len(index), PIECE)
  pieces['document'], pieces['start'], pieces['length'] = (
    document[index], start[index], size[index])
  bounds = np.cumsum(np.concatenate([np.zeros(1, np.int64), *per_row]))
  return bounds, pieces


def best_fit(histogram: np.ndarray, *, length: int) -> list[_Group]:
  """Packs pieces known by their length only, longest first, each where least room is left over.

  Args:
    histogram: int64 [length + 1], number of pieces of each length.
    length: room in a row.

  Returns:
    Groups of equal rows: ((piece length, copies), ...), number of rows.
  """
  open_rows: dict[int, collections.deque[_Group]] = collections.defaultdict(collections.deque)
  rooms: list[int] = []
  done: list[_Group] = []

  def put(pattern: tuple[tuple[int, int], ...], rows: int, room: int) -> None:
    if room == 0:
      done.append((pattern, rows))
      return
    if not open_rows[room]:
      bisect.insort(rooms, room)
    open_rows[room].append((pattern, rows))

  for piece in range(length, 0, -1):
    left = int(histogram[piece])
    while left:
      at = bisect.bisect_left(rooms, piece)
      room = rooms[at] if at < len(rooms) else length
      if at < len(rooms):
        pattern, rows = open_rows[room].popleft()
        if not open_rows[room]:
          del rooms[at]
      else:
        pattern, rows = (), left
      # Best fit returns to the row it has just narrowed while the same length fits again.
      copies = min(room // piece, left)
      used = min(rows, left // copies)
      put((*pattern, (piece, copies)), used, room - piece * copies)
      if pattern and rows > used:
        put(pattern, rows - used, room)
      left -= used * copies
  return done + [group for room in rooms for group in open_rows[room]]


def _is_whole(paths: dict[str, str]) -> bool:
  try:
    size = os.path.getsize(paths['bounds'])
    with open(paths['bounds'], 'rb') as file:
      file.seek(size - 8)
      last = int(np.frombuffer(file.read(8), np.int64)[0])
    return os.path.getsize(paths['pieces']) == last * PIECE.itemsize
  except (OSError, ValueError, IndexError):
    return False


def _write(paths: dict[str, str], *, bounds: np.ndarray, pieces: np.ndarray) -> bool:
  # The order matters: a plan counts once its bounds are there and agree with its pieces.
  with contextlib.suppress(OSError):
    for name, array in (('pieces', pieces), ('bounds', bounds)):
      with shards.atomic_file(paths[name]) as file:
        file.write(array.tobytes())
    return True
  return False
