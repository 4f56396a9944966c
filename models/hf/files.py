"""Safetensors files read tensor by tensor, without mapping them into memory.

The format (https://github.com/huggingface/safetensors): 8 bytes of little-endian header length, a
JSON header of name, dtype, shape and byte range, then the data.
"""

import json
import math
import os
import re
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
    if self.dtype not in DTYPES:
      raise ValueError(f'{self.path}: dtype {self.dtype} is unknown; known: {", ".join(DTYPES)}')
    with open(self.path, 'rb') as file:
      file.seek(self.start)
      data = file.read(self.size)
    if len(data) != self.size:
      raise ValueError(f'{self.path}: ends inside a tensor; download it again')
    return np.frombuffer(data, DTYPES[self.dtype]).reshape(self.shape)


def header(path: str) -> dict[str, Stored]:
  """The tensors of one file; a dtype we do not know is an error only where it is read.

  Args:
    path: of the file.
  Raises:
    ValueError: it is no safetensors file, has been cut, or its header contradicts itself; all that
      is wrong with it.
  """
  total = os.path.getsize(path)
  with open(path, 'rb') as file:
    length = int.from_bytes(file.read(8), 'little')
    if total < 8 or length > min(total - 8, _LONGEST_HEADER):
      raise ValueError(f'{path}: no safetensors file, or cut inside its header')
    twice: list[str] = []
    try:
      entries = json.loads(file.read(length), object_pairs_hook=lambda p: _unique(p, twice))
    except (ValueError, RecursionError):
      raise ValueError(f'{path}: its header is not JSON; not a safetensors file?') from None
  if not isinstance(entries, dict):
    raise ValueError(f'{path}: its header is no JSON object; not a safetensors file?')
  entries.pop('__metadata__', None)
  problems = [f'{path}: {name} is twice in its header' for name in twice]
  out = {}
  for name, entry in entries.items():
    if not _well_formed(entry):
      problems.append(f'{path}: {name} needs dtype, shape and data_offsets of numbers from 0, but '
                      f'has {str(entry)[:200]}')
      continue
    start, end = entry['data_offsets']
    found = Stored(path, entry['dtype'], tuple(entry['shape']), 8 + length + start, end - start)
    known = DTYPES.get(found.dtype)
    size = found.size if known is None else math.prod(found.shape) * known.itemsize
    if size != found.size:
      problems.append(f'{path}: {name} of shape {found.shape} needs {size} bytes, but has '
                      f'{found.size}')
    out[name] = found
  problems += [] if problems else _uncovered(path, out, start=8 + length, total=total)
  if problems:
    raise ValueError('\n'.join(problems))
  return out


def _unique(pairs: list[tuple[str, Any]], twice: list[str]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    names = [name for name, _ in pairs]
    twice += sorted({name for name in names if names.count(name) > 1})
  return found


def _well_formed(entry: Any) -> bool:
  if not isinstance(entry, dict) or not isinstance(entry.get('dtype'), str):
    return False
  shape, offsets = entry.get('shape'), entry.get('data_offsets')
  return (isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
          and all(type(n) is int and n >= 0 for n in (*shape, *offsets))
          and offsets[0] <= offsets[1])


def _uncovered(path: str, found: Mapping[str, Stored], *, start: int, total: int) -> list[str]:
  """What contradicts that the tensors lie one after the other and end where the file does."""
  last, at = 'its header', start
  problems = []
  for name, one in sorted(found.items(), key=lambda item: (item[1].start, item[1].size)):
    end = one.start + one.size
    if end > total:
      return [f'{path}: has {total} bytes, but {name} ends at byte {end}; it has been cut: '
              f'download it again']
    if one.start != at:
      problems.append(f'{path}: {name} begins at byte {one.start}, but {last} ends at {at}; '
                      f'tensors lie one after the other')
    last, at = name, max(at, end)
  if at != total:
    problems.append(f'{path}: has {total - at} bytes after {last}, which belong to no tensor')
  return problems


def tensors(directory: str) -> dict[str, Stored]:
  """The tensors of a checkpoint folder: one file, or several with an index.

  Args:
    directory: holds model.safetensors, or model.safetensors.index.json and the files it names.
  Raises:
    ValueError: neither is there or both, a file of the index is missing, or a file is broken; every
      such file is named.
  """
  index, single = (os.path.join(directory, name) for name in (INDEX, SINGLE))
  if os.path.exists(index) and os.path.exists(single):
    raise ValueError(f'{directory}: {SINGLE} and {INDEX} are both there, and may be two models; '
                     f'move one of them away')
  if os.path.exists(index):
    wanted = _index(index)
    names = sorted(set(wanted.values()))
  elif os.path.exists(single):
    wanted, names = {}, [SINGLE]
  else:
    raise ValueError(f'{directory}: neither {SINGLE} nor {INDEX} is there' + _other(directory))
  found: dict[str, Stored] = {}
  problems = []
  for name in names:
    try:
      more = header(os.path.join(directory, name))
    except FileNotFoundError:
      problems.append(f'{directory}: {name}, which {INDEX} names, is missing')
    except OSError as error:
      problems.append(f'{directory}: {name} cannot be read: {error.strerror}')
    except ValueError as error:
      problems.append(str(error))
    else:
      problems += [f'{directory}: {one} is in {os.path.basename(found[one].path)} and in {name}'
                   for one in more.keys() & found.keys()]
      found.update(more)
  if not problems:
    problems += [f'{directory}: {name}, which {INDEX} puts into {file}, is not there'
                 for name, file in wanted.items()
                 if name not in found or os.path.basename(found[name].path) != file]
  if problems:
    raise ValueError('\n'.join(problems))
  return found


def _index(path: str) -> dict[str, str]:
  """Which file each tensor is in."""
  try:
    with open(path, encoding='utf-8-sig') as file:
      found = json.load(file)['weight_map']
    if not (isinstance(found, dict) and found and all(isinstance(f, str) for f in found.values())):
      raise TypeError
  except (ValueError, RecursionError, KeyError, TypeError):
    raise ValueError(f'{path} is no JSON object whose weight_map names a file for each tensor; '
                     f'download it again') from None
  outside = sorted({name for name in found.values() if os.path.basename(name) != name or not name})
  if outside:
    raise ValueError(f'{path}: names files outside of its folder: {", ".join(outside)}')
  return found


def _other(directory: str) -> str:
  """What else might be meant."""
  if not os.path.isdir(directory):
    return '; there is no such folder'
  there = sorted(os.listdir(directory))
  return next((text.format(name) for pattern, text in _OTHERS for name in there
               if re.fullmatch(pattern, name)), '')


_OTHERS = (
    (r'adapter_model\..*', '; {} is an adapter (LoRA) without its model: merge them with peft, '
                           'merge_and_unload(), and save_pretrained the result'),
    (r'.*-\d+-of-\d+\.safetensors', '; {} is one of several files, whose index is missing: '
                                   'download it too'),
    (r'.*\.(bin|pt|pth|ckpt)', '; {} is a pickle, which could run code: save the model again with '
                              'save_pretrained(..., safe_serialization=True)'),
    (r'.*\.gguf', '; {} is quantised for llama.cpp: import the model it was made from'),
)
