"""Whole trees of parameters to and from tensors, and everything that can be wrong with a file."""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from models.hf import table
from models.hf.family import Family
from models.hf.files import Stored

FLOATS = ('F64', 'F32', 'F16', 'BF16')
# Buffers that files of older versions carry, of any family.
_BUFFERS = re.compile(r'(^|\.)(\w*rotary\w*\.(inv_freq|(cos|sin)_cached)|position_ids)$')


def match(family: Family, rows: Sequence[table.Row], leaves: Mapping[str, table.Leaf],
          stored: Mapping[str, Stored]) -> list[tuple[table.Place, str]]:
  """Finds each tensor a table expects.

  Args:
    family: whose spelling the names have.
    rows: its table for the configuration.
    leaves: our parameters.
    stored: tensors by the name they have in the file.
  Returns:
    (place, name in the file) in the order of the file's bytes, which reads fastest.
  Raises:
    ValueError: tensors are missing, unexpected, or of another shape or dtype; all are listed, with
      the nearest names.
  """
  names: dict[str, str] = {}
  problems = []
  for name in stored:
    canonical = family.canonical(name)
    if canonical is None or _BUFFERS.search(canonical):
      continue
    if canonical in names:
      problems.append(f'{names[canonical]} and {name} are the same parameter')
    names[canonical] = name
  expected = {place.theirs: place for place in table.places(rows, leaves)}
  missing, extra = sorted(expected.keys() - names.keys()), sorted(names.keys() - expected.keys())
  # A tied head is often stored beside the table it is tied to.
  extra = [name for name in extra if family.spare.get(name) not in expected.keys() & names.keys()
           and not _is_copy(name, expected, names, stored)]
  problems += [f'missing: {name} {list(expected[name].shape)}{_near(name, extra)}'
               for name in missing]
  problems += [f'unexpected: {names[name]} {list(stored[names[name]].shape)}'
               f'{_untied(name, expected, names) or _near(name, missing)}' for name in extra]
  for name in sorted(expected.keys() & names.keys()):
    found = stored[names[name]]
    if found.shape != expected[name].shape:
      problems.append(f'shape: {names[name]} is {list(found.shape)}, but config.json makes it '
                      f'{list(expected[name].shape)}')
    if found.dtype not in FLOATS:
      problems.append(f'dtype: {names[name]} is {found.dtype}; parameters are one of '
                      f'{", ".join(FLOATS)}')
  if problems:
    raise ValueError(f'{len(problems)} tensors do not fit a {family.name} of this config.json:\n'
                     + '\n'.join(problems))
  pairs = [(expected[name], names[name]) for name in expected]
  return sorted(pairs, key=lambda p: (stored[p[1]].path, stored[p[1]].start))


# A head's tensors as they are stored beside the parameter of ours that they repeat.
_COPIES = {('lm_head.weight', 'embed_out.weight', 'embed_tokens.weight', 'decoder.weight'):
           'embed/embedding', ('decoder.bias',): 'head_bias'}


def _originals(name: str, expected: Mapping[str, table.Place], names: Mapping[str, str]
               ) -> list[str]:
  """What an unexpected tensor may be tied to, by its name."""
  return [other for endings, ours in _COPIES.items() if name.endswith(endings)
          for other, place in expected.items()
          if place.row.parts[0].ours.endswith(ours) and other in names]


def _is_copy(name: str, expected: Mapping[str, table.Place], names: Mapping[str, str],
             stored: Mapping[str, Stored]) -> bool:
  """Whether an unexpected head holds the same numbers as the parameter it is tied to."""
  found = stored[names[name]]
  return any(found.shape == stored[names[other]].shape
             and {found.dtype, stored[names[other]].dtype} <= set(FLOATS)
             and np.array_equal(found.read(), stored[names[other]].read())
             for other in _originals(name, expected, names))


def _untied(name: str, expected: Mapping[str, table.Place], names: Mapping[str, str]) -> str:
  tied = _originals(name, expected, names)
  return (f'; config.json ties it to {names[tied[0]]}, but they differ: set tie_word_embeddings to '
          f'false where the model has both') if tied else ''


def _near(name: str, others: Sequence[str]) -> str:
  near = difflib.get_close_matches(name, others, 1)
  return f'; did you mean {near[0]}?' if near else ''


def from_tensors(family: Family, config: Any, leaves: Mapping[str, table.Leaf],
                 stored: Mapping[str, Stored]) -> dict[str, np.ndarray]:
  """Reads a whole small checkpoint.

  Args:
    family: its family.
    config: its configuration.
    leaves: our parameters.
    stored: its tensors.
  Returns:
    float32 arrays by path.
  Raises:
    ValueError: as `match`.
  """
  out = {path: np.empty(leaf.shape, np.float32) for path, leaf in leaves.items()}
  for place, name in match(family, family.layout(config, stored), leaves, stored):
    for path, value in table.to_ours(place, stored[name].read(), leaves):
      out[path][place.index] = value
  return out


def to_tensors(family: Family, config: Any, leaves: Mapping[str, table.Leaf],
               read: Callable[[str, tuple[int, ...]], np.ndarray], dtype: str = 'F32'):
  """Their tensors, one after the other.

  Args:
    family: to write as.
    config: ours.
    leaves: our parameters.
    read: (path, index into its leading axes) to that entry, float32.
    dtype: to write: 'F32', 'F16' or 'BF16'.
  Yields:
    (name, array).
  """
  wanted = np.dtype(jnp.bfloat16) if dtype == 'BF16' else np.dtype(
      {'F32': np.float32, 'F16': np.float16}[dtype])
  for place in table.places(family.rows(config), leaves):
    values = {part.ours: read(part.ours, place.index) for part in place.row.parts}
    yield place.theirs, table.to_theirs(place, values, leaves).astype(wanted, copy=False)
  yield from family.constants(config).items()
