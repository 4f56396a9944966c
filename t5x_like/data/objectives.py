"""Which pieces of documents make up each row, and rows as the features of a batch.

An objective maps row numbers of a source to spans (pieces of documents placed in rows) and a
document back to its rows. It reads tables of lengths only, never tokens.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

from t5x_like.data import plans as plans_lib
from t5x_like.data.streams import Stream, ragged_arange

Packing = Literal['concat', 'pack', 'none']
Attention = Literal['document', 'row']
PACKINGS: tuple[Packing, ...] = ('concat', 'pack', 'none')
FEATURES = {'inputs': np.int32, 'targets': np.int32, 'segment_ids': np.int32,
            'positions': np.int32, 'loss_weights': np.float32}


@dataclasses.dataclass(frozen=True)
class Spans:
  """Pieces of documents placed in rows, ordered by row, then column.

  Attributes:
    row: int64 [n], index into the rows asked for.
    column: int64 [n], where the piece begins in its row.
    segment: int64 [n], 1, 2, ... within each row.
    document: int64 [n].
    start: int64 [n], first token of the piece within its document.
    length: int64 [n], tokens, > 0.
  """

  row: np.ndarray
  column: np.ndarray
  segment: np.ndarray
  document: np.ndarray
  start: np.ndarray
  length: np.ndarray


class Objective(Protocol):
  """How a source's documents become rows.

  Attributes:
    rows: rows in one epoch.
  """

  rows: int

  def spans(self, rows: np.ndarray) -> Spans:
    """Returns the spans of rows, int64 [n], each in [0, self.rows)."""
    ...

  def rows_of(self, document: int) -> np.ndarray:
    """Returns the rows that hold a part of a document, int64 [k], ascending."""
    ...

  def cut_tokens(self) -> int:
    """Returns how many tokens of the source are in no row."""
    ...


class Concat:
  """Row r is tokens [r * length, (r + 1) * length) of the stream.

  Args:
    stream: of the source.
    length: tokens per row.
  """

  def __init__(self, stream: Stream, *, length: int):
    self._stream = stream
    self._length = length
    self.rows = -(-stream.tokens // length)

  def spans(self, rows: np.ndarray) -> Spans:
    """Returns the spans of rows, int64 [n], each in [0, self.rows)."""
    begin = rows * self._length
    end = np.minimum(begin + self._length, self._stream.tokens)
    first = self._stream.find(begin)
    counts = self._stream.find(end - 1) - first + 1
    row = np.repeat(np.arange(len(rows)), counts)
    document = first[row] + ragged_arange(counts)
    at = self._stream.starts(document)
    low = np.maximum(at, begin[row])
    high = np.minimum(self._stream.starts(document + 1), end[row])
    some = high > low
    row, document, at, low, high = (x[some] for x in (row, document, at, low, high))
    return Spans(row=row, column=low - begin[row], segment=_rank_in_row(row) + 1,
                 document=document, start=low - at, length=high - low)

  def rows_of(self, document: int) -> np.ndarray:
    """Returns the rows that hold a part of a document, int64 [k], ascending."""
    begin, end = self._stream.starts(np.array([document, document + 1])).tolist()
    return np.arange(begin // self._length, -(-end // self._length) if end > begin else 0)

  def cut_tokens(self) -> int:
    """Returns 0: every token is in exactly one row."""
    return 0


class Packed:
  """Rows of whole documents by a plan; a document longer than a row is cut into chunks.

  Args:
    plan: which pieces make up each row.
  """

  def __init__(self, plan: plans_lib.Plan):
    self._plan = plan
    self.rows = plan.rows

  def spans(self, rows: np.ndarray) -> Spans:
    """Returns the spans of rows, int64 [n], each in [0, self.rows)."""
    bounds = self._plan.bounds()
    first = bounds[rows]
    counts = bounds[rows + 1] - first
    row = np.repeat(np.arange(len(rows)), counts)
    segment = ragged_arange(counts)
    pieces = self._plan.pieces()[first[row] + segment]
    length = pieces['length'].astype(np.int64)
    before = np.cumsum(length) - length
    row_first = (np.cumsum(counts) - counts)[row]
    return Spans(row=row, column=before - before[row_first], segment=segment + 1,
                 document=pieces['document'].astype(np.int64),
                 start=pieces['start'].astype(np.int64), length=length)

  def rows_of(self, document: int) -> np.ndarray:
    """Returns the rows that hold a part of a document, int64 [k], ascending."""
    pieces = np.flatnonzero(self._plan.pieces()['document'] == document)
    return np.unique(np.searchsorted(self._plan.bounds(), pieces, side='right') - 1)

  def cut_tokens(self) -> int:
    """Returns 0: every token is in exactly one row."""
    return 0


class Unpacked:
  """Row r is document r, padded or cut.

  Args:
    stream: of the source.
    length: tokens per row.
  """

  def __init__(self, stream: Stream, *, length: int):
    self._stream = stream
    self._length = length
    self.rows = stream.documents

  def spans(self, rows: np.ndarray) -> Spans:
    """Returns the spans of rows, int64 [n], each in [0, self.rows)."""
    length = self._stream.starts(rows + 1) - self._stream.starts(rows)
    zero = np.zeros_like(rows)
    return Spans(row=np.arange(len(rows)), column=zero, segment=zero + 1, document=rows, start=zero,
                 length=np.minimum(length, self._length))

  def rows_of(self, document: int) -> np.ndarray:
    """Returns the row of a document, int64 [1]."""
    return np.array([document])

  def cut_tokens(self) -> int:
    """Returns how many tokens lie beyond the length of a row."""
    return int(np.maximum(self._stream.lengths() - self._length, 0).sum())


def spec(batch_size: int, *, length: int) -> dict[str, tuple[tuple[int, int], np.dtype]]:
  """Returns shape and dtype of each feature of a batch."""
  return {name: ((batch_size, length), np.dtype(dtype)) for name, dtype in FEATURES.items()}


def make(stream: Stream, *, packing: Packing, length: int) -> Objective:
  """Returns the objective of a packing; 'pack' computes its plan, or finds it beside the store."""
  if packing == 'concat':
    return Concat(stream, length=length)
  if packing == 'pack':
    return Packed(plans_lib.load(stream, length=length))
  if packing == 'none':
    return Unpacked(stream, length=length)
  raise ValueError(f'unknown packing {packing!r}; allowed: {", ".join(PACKINGS)}')


def assemble(parts: Sequence[tuple[Stream, np.ndarray, Spans]], *, rows: int, length: int,
             bos_id: int, pad_id: int, attention: Attention) -> dict[str, np.ndarray]:
  """Reads the tokens of spans and lays them out as the features of a batch.

  Args:
    parts: per source its stream, the batch row of each of its rows, and their spans.
    rows: rows of the batch.
    length: tokens per row.
    bos_id: first input of a document.
    pad_id: fills the rest of a row.
    attention: 'row' makes each row one segment.

  Returns:
    Arrays [rows, length]; see FEATURES.
  """
  blank = {'inputs': pad_id, 'targets': pad_id}
  out = {name: np.full(rows * length, blank.get(name, 0), dtype)
         for name, dtype in FEATURES.items()}
  if parts:
    at, values = _lay_out(parts, length=length, bos_id=bos_id, attention=attention)
    for name, array in out.items():
      array[at] = values[name]
  return {name: array.reshape(rows, length) for name, array in out.items()}


def _lay_out(parts: Sequence[tuple[Stream, np.ndarray, Spans]], *, length: int, bos_id: int,
             attention: Attention) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  reads = [_read(*part) for part in parts]
  tokens, previous, weights, row, column, segment, sizes = (
    np.concatenate([r[i] for r in reads]) for i in range(7))
  inside = ragged_arange(sizes)
  at = np.repeat(row * length + column, sizes) + inside
  shifted = np.empty_like(tokens)
  shifted[1:] = tokens[:-1]
  shifted[np.cumsum(sizes) - sizes] = np.where(previous < 0, bos_id, previous)
  if attention == 'row':
    inside = inside + np.repeat(column, sizes)
    segment = np.ones_like(segment)
  return at, {'inputs': shifted, 'targets': tokens, 'segment_ids': np.repeat(segment, sizes),
              'positions': inside, 'loss_weights': weights}


def _read(stream: Stream, rows: np.ndarray, spans: Spans) -> tuple[np.ndarray, ...]:
  tokens = stream.read(spans.document, starts=spans.start, lengths=spans.length)
  previous = np.full(len(spans.start), -1, np.int32)
  inner = spans.start > 0
  previous[inner] = stream.read(spans.document[inner], starts=spans.start[inner] - 1,
                                lengths=np.ones(int(inner.sum()), np.int64))
  weights = np.ones(len(tokens), np.float32)
  if len(stream.features) > 1:
    in_prefix = stream.prefixes(spans.document) - spans.start
    weights[ragged_arange(spans.length) < np.repeat(in_prefix, spans.length)] = 0
  return tokens, previous, weights, rows[spans.row], spans.column, spans.segment, spans.length


def _rank_in_row(row: np.ndarray) -> np.ndarray:
  first = np.flatnonzero(np.r_[True, row[1:] != row[:-1]]) if len(row) else row
  return np.arange(len(row)) - np.repeat(first, np.diff(np.r_[first, len(row)]))
