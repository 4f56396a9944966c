"""Documents split into what an encoder reads and a decoder writes, both sides packed alike."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from t5x_like.data import store as store_lib

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
    mask_id: stands for a hidden token, where the vocabulary has a token for that.
  """

  size: int
  sentinels: int
  pad_id: int
  bos_id: int
  eos_id: int | None
  mask_id: int | None = None


def vocabulary_of(stores: Mapping[str, store_lib.Store]) -> Vocabulary:
  """Returns what an objective needs to know of the one vocabulary of some stores.

  Args:
    stores: at least one, by the name of its source.
  """
  first = next(iter(stores.values()))
  described = first.manifest['vocabulary']
  return Vocabulary(
    size=max(store.vocab_size for store in stores.values()),
    sentinels=described.get('sentinels', described.get('extra_ids', 0)), pad_id=first.pad_id,
    bos_id=first.bos_id, eos_id=first.eos_id, mask_id=described.get('mask_id'))


def segmentation(items: int, segments: int, rng: np.random.Generator) -> np.ndarray:
  """Returns the sizes, each at least 1, of a random split of items, int64 [segments]."""
  cuts = np.sort(rng.permutation(items - 1)[:segments - 1]) + 1
  return np.diff(np.concatenate([[0], cuts, [items]]))


def row_spec(batch_size: int, *, length: int, prefix: str = '') -> Spec:
  """Returns shape and dtype of the features of a row; with a prefix, of those that are read only.

  Args:
    batch_size: rows.
    length: tokens per row.
    prefix: of the features' names, for an encoder.
  """
  names = ('inputs', 'segment_ids', 'positions')
  shape = (batch_size, length)
  spec = {prefix + name: (shape, np.dtype(np.int32)) for name in names}
  if prefix:
    return spec
  return {**spec, 'targets': (shape, np.dtype(np.int32)),
          'loss_weights': (shape, np.dtype(np.float32))}


def pair_spec(batch_size: int, *, length: int, written: int) -> Spec:
  """Returns shape and dtype of the features of an encoder and a decoder.

  Args:
    batch_size: rows.
    length: tokens an encoder reads per row.
    written: tokens a decoder writes per row.
  """
  return {**row_spec(batch_size, length=length, prefix='encoder_'),
          **row_spec(batch_size, length=written)}


def pack(batch: Batch, make: Callable[[np.ndarray, int], Pair], *, vocabulary: Vocabulary,
         written: int) -> Batch:
  """Splits the documents of each row and packs both sides under the same segment numbers.

  Args:
    batch: `targets` and `segment_ids`, int32 [rows, length].
    make: splits the tokens of a document of a row.
    vocabulary: of the tokens.
    written: tokens of a decoder row; documents that no longer fit are left out.
  """
  rows, length = batch['targets'].shape
  spec = pair_spec(rows, length=length, written=written)
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
