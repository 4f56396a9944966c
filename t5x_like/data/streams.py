"""A store as one stream of documents: each one's inputs, if the task has them, then its targets."""

import numpy as np

from t5x_like.data import store as store_lib


def ragged_arange(lengths: np.ndarray) -> np.ndarray:
  """Returns 0 .. lengths[0] - 1, 0 .. lengths[1] - 1, ..., int64 [sum(lengths)]."""
  ends = np.cumsum(lengths)
  total = int(ends[-1]) if len(ends) else 0
  return np.arange(total) - np.repeat(ends - lengths, lengths)


class Stream:
  """Documents of a store end to end, as a decoder reads them.

  Args:
    store: with feature 'targets', or 'inputs' and 'targets'.

  Raises:
    ValueError: for other features.
  """

  def __init__(self, store: store_lib.Store):
    if set(store.features) not in ({'targets'}, {'inputs', 'targets'}):
      raise ValueError(f'{store.path} has features {", ".join(store.features)}; a decoder reads '
                       f'"targets", or "inputs" and "targets": rename the outputs of the task')
    self.store = store
    self.features = [f for f in ('inputs', 'targets') if f in store.features]
    self.documents = store.num_documents
    self.tokens = sum(store.num_tokens(f) for f in self.features)

  def starts(self, documents: np.ndarray) -> np.ndarray:
    """Returns where documents begin in the stream (documents may be the count), int64 [n]."""
    out = self.store.offsets(self.features[0])[documents].astype(np.int64)
    for feature in self.features[1:]:
      out += self.store.offsets(feature)[documents].astype(np.int64)
    return out

  def lengths(self) -> np.ndarray:
    """Returns the length of every document, int64 [documents]; reads the whole table."""
    return np.diff(self.starts(np.arange(self.documents + 1)))

  def find(self, positions: np.ndarray) -> np.ndarray:
    """Returns the document that holds each position of the stream, int64 [n]."""
    if len(self.features) == 1:
      offsets = self.store.offsets(self.features[0])
      return np.searchsorted(offsets, positions.astype(np.uint64), side='right') - 1
    # Bisection of all positions at once touches few pages of a table of any size.
    low = np.zeros(len(positions), np.int64)
    high = np.full(len(positions), self.documents, np.int64)
    for _ in range(int(self.documents).bit_length()):
      middle = (low + high) // 2
      right = (self.starts(middle) <= positions) & (high - low > 1)
      low = np.where(right, middle, low)
      high = np.where(right | (high - low <= 1), high, middle)
    return low

  def prefixes(self, documents: np.ndarray) -> np.ndarray:
    """Returns how many leading tokens of each document are inputs, int64 [n]."""
    if len(self.features) == 1:
      return np.zeros(len(documents), np.int64)
    offsets = self.store.offsets('inputs')
    return (offsets[documents + 1] - offsets[documents]).astype(np.int64)

  def read(self, documents: np.ndarray, *, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Reads pieces of documents, one after the other.

    Args:
      documents: int64 [n].
      starts: int64 [n], first token within the document.
      lengths: int64 [n], tokens to read, all within the document.

    Returns:
      int32 [sum(lengths)].
    """
    if len(self.features) == 1:
      return self._read_ranges('targets', self.starts(documents) + starts, lengths)
    prefix = self.prefixes(documents)
    in_inputs = np.clip(prefix - starts, 0, lengths)
    inputs = self.store.offsets('inputs')[documents].astype(np.int64) + starts
    targets = (self.store.offsets('targets')[documents].astype(np.int64)
               + np.maximum(starts - prefix, 0))
    from_inputs = ragged_arange(lengths) < np.repeat(in_inputs, lengths)
    out = np.empty(len(from_inputs), np.int32)
    out[from_inputs] = self._read_ranges('inputs', inputs, in_inputs)
    out[~from_inputs] = self._read_ranges('targets', targets, lengths - in_inputs)
    return out

  def _read_ranges(self, feature: str, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    some = lengths > 0
    starts, lengths = starts[some], lengths[some]
    if len(starts):
      # Ranges that follow each other in the store are read as one.
      first = np.flatnonzero(np.r_[True, starts[1:] != (starts + lengths)[:-1]])
      starts, lengths = starts[first], np.add.reduceat(lengths, first)
    return self.store.tokens(feature).read(starts, lengths=lengths).astype(np.int32)
