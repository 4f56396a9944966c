"""The arrays of a checkpoint, read and written piece by piece.

They are zarr arrays as Orbax writes them: a folder of chunks per array, or all inside one OCDBT
store. What is written here is the former, a chunk per layer, so that neither writing nor reading
ever needs a whole stack of layers.
"""

import collections
import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from t5x_like import integrity

SLAB = 16 << 20  # bytes converted and written at once
_IN_FLIGHT = 2


def folder_name(name: str) -> str:
  """The folder of an array in a checkpoint, as Orbax names it."""
  return name.replace('/', '.')


class Writer:
  """Writes one array entry by entry; what is written again is replaced."""

  def __init__(self, folder: str, *, name: str, shape: tuple[int, ...], dtype: str, leading: int,
               shard: tuple[int, ...]):
    """Opens or makes the array.

    Args:
      folder: of all arrays.
      name: of the array, with '/'.
      shape: of the whole array.
      dtype: of its elements.
      leading: axes counted up by entries: layers, experts.
      shard: shape of one device's part; chunks do not straddle it.
    """
    self.name, self.shape, self.dtype, self.leading = name, shape, np.dtype(dtype), leading
    entry = shape[leading:]
    self.entry_size = int(np.prod(entry, dtype=np.int64))
    self.rows = entry[0] if entry else 1
    row_bytes = max(1, self.entry_size // max(1, self.rows)) * self.dtype.itemsize
    self.step = max(1, min(self.rows, shard[leading] if entry else 1, SLAB // row_bytes))
    chunks = (1,) * leading + ((self.step, *shard[leading + 1:]) if entry else ())
    encoded = 'bfloat16' if dtype == 'bfloat16' else self.dtype.newbyteorder('<').str
    self._store = ts.open({
        'driver': 'zarr', 'kvstore': {'driver': 'file', 'path': os.path.join(
            folder, folder_name(name)) + '/'},
        'metadata': {'shape': list(shape), 'chunks': list(chunks), 'dtype': encoded,
                     'compressor': None, 'fill_value': None, 'order': 'C'},
    }, open=True, create=True).result()
    self._pending: collections.deque[Any] = collections.deque()

  def write(self, index: tuple[int, ...], value: np.ndarray, sums: integrity.Pieces) -> None:
    """Writes an entry, a slab of rows at a time.

    Args:
      index: into the leading axes.
      value: of the entry's shape; may be a view in any order and of another float dtype.
      sums: takes up what is written.
    """
    start = self.entry_size * int(np.ravel_multi_index(index, self.shape[:self.leading])
                                  if index else 0)
    width = self.entry_size // max(1, self.rows)
    for row in range(0, self.rows, self.step):
      stop = min(row + self.step, self.rows)
      part = value[row:stop] if value.ndim else value
      with np.errstate(over='ignore'):  # What overflows is counted as infinite.
        slab = np.ascontiguousarray(part).astype(self.dtype, copy=False)
      sums.add(slab, start + row * width)
      where = (*index, slice(row, stop)) if value.ndim else index
      while len(self._pending) >= _IN_FLIGHT:
        self._pending.popleft().result()
      self._pending.append(self._store[where].write(slab.reshape(part.shape)))

  def flush(self) -> None:
    """Returns once everything is on disk."""
    while self._pending:
      self._pending.popleft().result()


def frame(target: str, *, arrays: str, manifest: Mapping[str, Any]) -> None:
  """Makes a checkpoint around arrays that are already written.

  Args:
    target: the checkpoint's folder, which must not exist.
    arrays: folder of the arrays; they are moved.
    manifest: what is in the checkpoint, sealed.
  """
  tensors = manifest['body']['tensors']
  state = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
  handler = ocp.CompositeCheckpointHandler(state=state, manifest=ocp.JsonCheckpointHandler())
  # Orbax describes a tree of single elements; ours then take their places.
  small = integrity.nest({name: jnp.zeros((1,) * len(t['shape']), t['dtype'])
                          for name, t in tensors.items()})
  with ocp.Checkpointer(handler) as writer, _quiet():
    writer.save(target, args=ocp.args.Composite(
        state=ocp.args.PyTreeSave(small), manifest=ocp.args.JsonSave(dict(manifest))))
  inside = os.path.join(target, 'state')
  described = os.path.join(inside, '_METADATA')
  with open(described, encoding='utf-8') as file:
    tree = json.load(file)
  for entry in tree['tree_metadata'].values():
    name = '/'.join(key['key'] for key in entry['key_metadata'])
    entry['value_metadata']['write_shape'] = tensors[name]['shape']
  with open(described, 'w', encoding='utf-8') as file:
    json.dump(tree, file)
  shutil.rmtree(os.path.join(inside, 'array_metadatas'), ignore_errors=True)
  for name in map(folder_name, tensors):
    shutil.rmtree(os.path.join(inside, name))
    os.rename(os.path.join(arrays, name), os.path.join(inside, name))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keeps Orbax from warning that there is no OCDBT store to merge, and from telling errors twice.
  """
  log = logging.getLogger('absl')
  unwanted = lambda record: not any(
      word in record.getMessage() for word in ('OCDBT', '_SignalingThread'))
  log.addFilter(unwanted)
  try:
    yield
  finally:
    log.removeFilter(unwanted)


def unframe(target: str, *, arrays: str) -> None:
  """Undoes a `frame` that was interrupted."""
  inside = os.path.join(target, 'state')
  for name in os.listdir(inside) if os.path.isdir(inside) else ():
    found, wanted = os.path.join(inside, name), os.path.join(arrays, name)
    if os.path.isdir(found) and name != 'array_metadatas' and not os.path.exists(wanted):
      os.rename(found, wanted)
  parent, step = os.path.split(target)
  for name in os.listdir(parent):
    if name == step or name.startswith(f'{step}.'):
      shutil.rmtree(os.path.join(parent, name))


class Reader:
  """Reads the arrays of one checkpoint entry by entry, and checks what it has read."""

  def __init__(self, checkpoint: str):
    """Opens a checkpoint.

    Args:
      checkpoint: its folder, `<directory>/<step>`.
    Raises:
      ValueError: its manifest is damaged.
    """
    self.path = checkpoint
    try:
      manifest = ocp.JsonCheckpointHandler().restore(epath.Path(checkpoint) / 'manifest')
      self.body = integrity.unseal(manifest)
    except integrity.Damaged as error:
      raise ValueError(f'checkpoint {checkpoint} is damaged: {error}') from None
    self.tensors: dict[str, dict[str, Any]] = self.body['tensors']
    state = os.path.join(checkpoint, 'state') + '/'
    self._base: dict[str, Any] = {'driver': 'file', 'path': state}
    if os.path.exists(os.path.join(state, 'manifest.ocdbt')):
      self._base = {'driver': 'ocdbt', 'base': self._base}
    # Memory that many threads have freed is kept for each of them.
    self._context = ts.Context({'data_copy_concurrency': {'limit': 1},
                                'file_io_concurrency': {'limit': 1}})
    self._open: dict[str, Any] = {}
    self._whole: dict[str, np.ndarray] = {}
    self._sums: dict[str, integrity.Pieces] = {}
    self._read: dict[str, set[tuple[int, ...]]] = {}

  def read(self, name: str, index: tuple[int, ...]) -> np.ndarray:
    """An entry of an array.

    Args:
      name: of the array, with '/'.
      index: into its leading axes.
    """
    try:
      value = self._value(name, index)
    except ValueError as error:
      raise ValueError(f'checkpoint {self.path} is damaged: {name} cannot be read: '
                       f'{" ".join(str(error).split())[:500]}') from None
    seen = self._read.setdefault(name, set())
    if index not in seen:
      seen.add(index)
      leading = tuple(self.tensors[name]['shape'][:len(index)])
      number = int(np.ravel_multi_index(index, leading)) if index else 0
      self._sums.setdefault(name, integrity.Pieces()).add(value, number * value.size)
    return value

  def _value(self, name: str, index: tuple[int, ...]) -> np.ndarray:
    if name not in self._open:
      kvstore = dict(self._base)
      folder = folder_name(name) + '/'
      kvstore['path'] = kvstore.get('path', '') + folder
      self._open[name] = ts.open({'driver': 'zarr', 'kvstore': kvstore}, open=True, read=True,
                                 context=self._context).result()
    store = self._open[name]
    if all(n == 1 for n in store.chunk_layout.read_chunk.shape[:len(index)]):
      return store[index].read().result()
    # Chunks that hold several layers are decoded once.
    if name not in self._whole:
      self._whole[name] = store.read().result()
    return self._whole[name][index]

  def keep(self, arrays: Iterable[str]) -> None:
    """Forgets every array but these, which are about to be read.

    Args:
      arrays: their names.
    """
    self._whole = {name: self._whole[name] for name in arrays if name in self._whole}

  def check(self) -> None:
    """Compares the checksums of all that was read, once it was read whole.

    Raises:
      ValueError: naming every array that is not what was saved.
    """
    wrong = [name for name, sums in self._sums.items()
             if integrity.sums_text(sums.sums) != self.tensors[name]['checksum']]
    if wrong:
      raise ValueError(f'checkpoint {self.path} is damaged: {", ".join(sorted(wrong))} differ from '
                       f'what was saved; export an earlier step')
