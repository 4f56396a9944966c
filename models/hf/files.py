"""Safetensors files read tensor by tensor, without mapping them into memory.

The format (https://github.com/huggingface/safetensors): 8 bytes of little-endian header length, a
JSON header of name, dtype, shape and byte range, then the data.
"""

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

DTYPES: Mapping[str, Any] = {
    'F64': np.dtype('<f8'), 'F32': np.dtype('<f4'), 'F16': np.dtype('<f2'),
    'BF16': np.dtype(jnp.bfloat16), 'I64': np.dtype('<i8'), 'I32': np.dtype('<i4'),
    'I16': np.dtype('<i2'), 'I8': np.dtype('i1'), 'U8': np.dtype('u1'), 'BOOL': np.dtype('bool'),
}
INDEX = 'model.safetensors.index.json'
SINGLE = 'model.safetensors'
_LONGEST_HEADER = 100 << 20


class Stored(NamedTuple):
  """Where a tensor lies.

  Attributes:
    path: of its file.
    dtype: its name in the format.
    shape: its shape.
    start: first byte in the file.
    size: bytes.
  """

  path: str
  dtype: str
  shape: tuple[int, ...]
  start: int
  size: int

  def read(self) -> np.ndarray:
    """The tensor in its own dtype."""
    with open(self.path, 'rb') as file:
      file.seek(self.start)
      data = file.read(self.size)
    if len(data) != self.size:
      raise ValueError(f'{self.path}: ends inside a tensor; download it again')
    return np.frombuffer(data, DTYPES[self.dtype]).reshape(self.shape)


def header(path: str) -> dict[str, Stored]:
  """The tensors of one file.

  Args:
    path: of the file.
  Raises:
    ValueError: it is no safetensors file, has been cut, or has a dtype we do not know.
  """
  total = os.path.getsize(path)
  with open(path, 'rb') as file:
    length = int.from_bytes(file.read(8), 'little')
    if total < 8 or length > min(total - 8, _LONGEST_HEADER):
      raise ValueError(f'{path}: no safetensors file, or cut inside its header')
    try:
      entries = json.loads(file.read(length))
    except ValueError:
      raise ValueError(f'{path}: its header is not JSON; not a safetensors file?') from None
  out = {}
  for name, entry in entries.items():
    if name == '__metadata__':
      continue
    start, end = entry['data_offsets']
    shape = tuple(entry['shape'])
    if entry['dtype'] not in DTYPES:
      raise ValueError(f'{path}: {name} has dtype {entry["dtype"]}; known: {", ".join(DTYPES)}')
    size = int(np.prod(shape, dtype=np.int64)) * DTYPES[entry['dtype']].itemsize
    if size != end - start:
      raise ValueError(f'{path}: {name} of shape {shape} needs {size} bytes, but has {end - start}')
    if 8 + length + end > total:
      raise ValueError(f'{path}: has {total} bytes, but {name} ends at byte {8 + length + end}; it '
                       f'has been cut: download it again')
    out[name] = Stored(path, entry['dtype'], shape, 8 + length + start, size)
  return out


def tensors(directory: str) -> dict[str, Stored]:
  """The tensors of a checkpoint folder: one file, or several with an index.

  Args:
    directory: holds model.safetensors, or model.safetensors.index.json and the files it names.
  Raises:
    ValueError: neither is there, a file of the index is missing, or a file is broken; every such
      file is named.
  """
  index = os.path.join(directory, INDEX)
  if os.path.exists(index):
    with open(index, encoding='utf-8') as file:
      wanted = json.load(file)['weight_map']
    names = sorted(set(wanted.values()))
  elif os.path.exists(os.path.join(directory, SINGLE)):
    wanted, names = {}, [SINGLE]
  else:
    raise ValueError(f'{directory}: neither {SINGLE} nor {INDEX} is there' + _other(directory))
  found: dict[str, Stored] = {}
  problems = []
  for name in names:
    try:
      found.update(header(os.path.join(directory, name)))
    except FileNotFoundError:
      problems.append(f'{directory}: {name}, which {INDEX} names, is missing')
    except ValueError as error:
      problems.append(str(error))
  if not problems:
    problems += [f'{directory}: {name}, which {INDEX} puts into {file}, is not there'
                 for name, file in wanted.items()
                 if name not in found or os.path.basename(found[name].path) != file]
  if problems:
    raise ValueError('\n'.join(problems))
  return found


def _other(directory: str) -> str:
  """What else might be meant."""
  if not os.path.isdir(directory):
    return '; there is no such folder'
  pickled = sorted(name for name in os.listdir(directory) if name.endswith('.bin'))
  if pickled:
    return (f'; {pickled[0]} is a pickle, which could run code: save the model again with '
            f'save_pretrained(..., safe_serialization=True)')
  return ''
