"""Writes safetensors files whose tensors come one at a time; `models.hf.files` reads them."""

import json
import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from models.hf import files

_UNITS = {'B': 1, 'KB': 10**3, 'MB': 10**6, 'GB': 10**9}


class Planned(NamedTuple):
  """A tensor before it exists.

  Attributes:
    name: of the tensor.
    dtype: its name in the format, such as 'BF16'.
    shape: its shape.
  """

  name: str
  dtype: str
  shape: tuple[int, ...]

  @property
  def size(self) -> int:
    """Bytes of its data."""
    return int(np.prod(self.shape, dtype=np.int64)) * files.DTYPES[self.dtype].itemsize


def size(text: str) -> int:
  """Bytes of a size such as '5GB'.

  Args:
    text: a number and B, KB, MB or GB (powers of ten).
  Raises:
    ValueError: it is none.
  """
  digits = text.strip().upper().rstrip('BKMG')
  unit = text.strip().upper()[len(digits):] or 'B'
  try:
    found = int(float(digits) * _UNITS[unit])
  except (ValueError, KeyError):
    found = 0
  if found < 1:
    raise ValueError(f'shard_size={text!r} is no size; write 5GB or 500MB')
  return found


def write(folder: str, planned: Sequence[Planned], tensors: Iterable[np.ndarray], *,
          shard_size: int) -> list[str]:
  """Writes one file, or several with an index, as transformers names them.

  Args:
    folder: which exists.
    planned: what will come.
    tensors: the arrays, in that order.
    shard_size: bytes of tensors per file; a larger tensor has a file of its own.
  Returns:
    Names of the files with tensors.
  """
  parts = shards(planned, shard_size)
  count = len(parts)
  names = [files.SINGLE] if count == 1 else [
      f'model-{i + 1:05d}-of-{count:05d}.safetensors' for i in range(count)]
  source = iter(tensors)
  for name, shard in zip(names, parts, strict=True):
    with open(os.path.join(folder, name), 'wb') as file:
      file.write(_header(shard))
      for one in shard:
        tensor = np.ascontiguousarray(next(source))
        assert tensor.shape == one.shape and tensor.dtype == files.DTYPES[one.dtype], one
        file.write(tensor.reshape(-1).view(np.uint8).data)
      file.flush()
      os.fsync(file.fileno())
  for left in source:  # Lets the source end, which may refuse what it has given.
    raise AssertionError(left)
  if count > 1:
    where = {one.name: name for name, shard in zip(names, parts, strict=True) for one in shard}
    with open(os.path.join(folder, files.INDEX), 'w', encoding='utf-8') as file:
      json.dump({'metadata': {'total_size': sum(p.size for p in planned)},
                 'weight_map': dict(sorted(where.items()))}, file, indent=2)
  return names


def shards(planned: Sequence[Planned], shard_size: int) -> list[list[Planned]]:
  """The tensors of each file.

  Args:
    planned: what will come.
    shard_size: bytes of tensors per file; a larger tensor has a file of its own.
  """
  parts: list[list[Planned]] = [[]]
  for one in planned:
    if parts[-1] and sum(p.size for p in parts[-1]) + one.size > shard_size:
      parts.append([])
    parts[-1].append(one)
  return parts


def _header(shard: Sequence[Planned]) -> bytes:
  entries: dict[str, object] = {'__metadata__': {'format': 'pt'}}
  start = 0
  for one in shard:
    entries[one.name] = {'dtype': one.dtype, 'shape': list(one.shape),
                         'data_offsets': [start, start + one.size]}
    start += one.size
  text = json.dumps(entries, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  return len(text).to_bytes(8, 'little') + text
