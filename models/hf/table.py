"""Name tables: how a Hugging Face tensor becomes ours and back, without loss.

A row names one tensor of theirs and the parameters of ours that it holds. `dims` names its
dimensions by our logical axes, as they lie in their file: '(heads head_dim) embed' is a matrix of
heads * head_dim rows and embed columns. Sizes are never written down: they are those of our
parameter, whose own axes also say how to transpose.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

STACKED = 'layers'
EXPERTS = 'experts'


class Leaf(NamedTuple):
  """One parameter of ours.

  Attributes:
    axes: logical axes, the stacked 'layers' included.
    shape: their sizes.
  """

  axes: tuple[str, ...]
  shape: tuple[int, ...]


class Part(NamedTuple):
  """One parameter inside a tensor of theirs.

  Attributes:
    ours: its path.
    dims: dimensions of this part as they lie in their file, by our logical axes.
  """

  ours: str
  dims: str


@dataclasses.dataclass(frozen=True)
class Row:
  """One tensor of theirs, or one per layer or expert.

  Attributes:
    theirs: its name; '{layer}' and '{expert}' count up.
    parts: what it holds, one after the other along dimension `along`.
    along: their dimension that parts are joined in.
    groups: logical axis whose entries each hold a piece of every part (NeoX joins query, key and
      value of a head, then come those of the next); '' joins whole parts.
    first: number of the first layer in their file.
  """

  theirs: str
  parts: tuple[Part, ...]
  along: int = 0
  groups: str = ''
  first: int = 0


def row(theirs: str, ours: str, dims: str) -> Row:
  """A tensor that holds one parameter; see `Row` and `Part`."""
  return Row(theirs, (Part(ours, dims),))


def fused(theirs: str, *parts: tuple[str, str], along: int = 0, groups: str = '') -> Row:
  """A tensor that joins several parameters; see `Row` and `Part`."""
  return Row(theirs, tuple(Part(*p) for p in parts), along, groups)


class Place(NamedTuple):
  """Where one tensor of theirs goes.

  Attributes:
    theirs: its full name.
    row: of the table.
    index: of the entry in the leading axes of our parameters: (layer,), (layer, expert) or ().
    shape: it must have.
  """

  theirs: str
  row: Row
  index: tuple[int, ...]
  shape: tuple[int, ...]


def places(rows: Sequence[Row], leaves: Mapping[str, Leaf]) -> Iterator[Place]:
  """Every tensor a table expects, in the order of its rows.

  Args:
    rows: the table.
    leaves: our parameters.
  Raises:
    ValueError: the table and our parameters do not fit; a mistake in the table.
  """
  told: set[str] = set()
  for entry in rows:
    for part in entry.parts:
      if part.ours not in leaves:
        raise ValueError(f'table row {entry.theirs!r}: no parameter {part.ours!r}; there are '
                         f'{", ".join(sorted(leaves))}')
      told.add(part.ours)
    shape = _shape(entry, leaves)
    counts = _counts(entry, leaves[entry.parts[0].ours])
    for index in np.ndindex(*counts):
      names = dict(zip(('layer', 'expert'), index, strict=False))
      if 'layer' in names:
        names['layer'] += entry.first
      yield Place(entry.theirs.format(**names), entry, tuple(int(i) for i in index), shape)
  missing = sorted(leaves.keys() - told)
  if missing:
    raise ValueError(f'the table names no tensor for {", ".join(missing)}')


def to_ours(place: Place, tensor: np.ndarray, leaves: Mapping[str, Leaf]
            ) -> Iterator[tuple[str, np.ndarray]]:
  """Splits and transposes one tensor.

  Args:
    place: where it goes.
    tensor: of shape `place.shape`.
    leaves: our parameters.
  Yields:
    (path, entry of that parameter at `place.index`), views where that is possible.
  """
  entry = place.row
  joined, sizes = _joined(entry, leaves)
  if len(entry.parts) > 1:
    tensor = tensor.reshape(joined)
  start = 0
  for part, size in zip(entry.parts, sizes, strict=True):
    piece = tensor
    if len(entry.parts) > 1:
      piece = tensor[(slice(None),) * (entry.along + 1) + (slice(start, start + size),)]
      start += size
    yield part.ours, _turn(piece, part, leaves[part.ours])


def to_theirs(place: Place, values: Mapping[str, np.ndarray], leaves: Mapping[str, Leaf]
              ) -> np.ndarray:
  """The inverse of `to_ours`.

  Args:
    place: which tensor.
    values: entries at `place.index` of the parameters it holds.
    leaves: our parameters.
  Returns:
    Their tensor, of shape `place.shape`, contiguous.
  """
  entry = place.row
  pieces = [_turn_back(values[part.ours], part, leaves[part.ours]) for part in entry.parts]
  if len(pieces) == 1:
    return np.ascontiguousarray(pieces[0].reshape(place.shape))
  joined, sizes = _joined(entry, leaves)
  at = entry.along + 1
  pieces = [p.reshape(joined[:at] + (size,) + joined[at + 1:])
            for p, size in zip(pieces, sizes, strict=True)]
  return np.ascontiguousarray(np.concatenate(pieces, at).reshape(place.shape))


def _names(dims: str) -> list[list[str]]:
  """'(a b) c' as [['a', 'b'], ['c']]."""
  return [group.strip('()').split() for group in re.findall(r'\([^)]*\)|\S+', dims)]


def _leading(entry: Row) -> tuple[str, ...]:
  return tuple(axis for axis, mark in ((STACKED, '{layer}'), (EXPERTS, '{expert}'))
               if mark in entry.theirs)


def _counts(entry: Row, leaf: Leaf) -> tuple[int, ...]:
  leading = _leading(entry)
  if leaf.axes[:len(leading)] != leading:
    raise ValueError(f'table row {entry.theirs!r}: {entry.parts[0].ours!r} has axes {leaf.axes}, '
                     f'which do not start with {leading}')
  return leaf.shape[:len(leading)]


def _sizes(leaf: Leaf) -> dict[str, int]:
  return dict(zip(leaf.axes, leaf.shape, strict=True))


def _own_shape(part: Part, leaf: Leaf) -> tuple[int, ...]:
  """Shape of one part as it lies in their file."""
  sizes = _sizes(leaf)
  unknown = [n for group in _names(part.dims) for n in group if n not in sizes and n != '1']
  if unknown:
    raise ValueError(f'{part.ours!r} has axes {leaf.axes}, but its dims {part.dims!r} name '
                     f'{unknown}')
  return tuple(int(np.prod([sizes.get(n, 1) for n in group], dtype=np.int64))
               for group in _names(part.dims))


def _joined(entry: Row, leaves: Mapping[str, Leaf]) -> tuple[tuple[int, ...], list[int]]:
  """Their shape with the joined dimension split into (groups, rest), and each part's rest."""
  shapes = [_own_shape(part, leaves[part.ours]) for part in entry.parts]
  groups = 1
  if entry.groups:
    sizes = [_sizes(leaves[p.ours]) for p in entry.parts]
    groups = next(s[entry.groups] for s in sizes if entry.groups in s)
  rests = [shape[entry.along] // groups for shape in shapes]
  first = shapes[0]
  return (*first[:entry.along], groups, sum(rests), *first[entry.along + 1:]), rests


def _shape(entry: Row, leaves: Mapping[str, Leaf]) -> tuple[int, ...]:
  joined, _ = _joined(entry, leaves)
  at = entry.along
  return (*joined[:at], joined[at] * joined[at + 1], *joined[at + 2:])


def _turn(piece: np.ndarray, part: Part, leaf: Leaf) -> np.ndarray:
  sizes = _sizes(leaf)
  flat = [n for group in _names(part.dims) for n in group if n != '1']
  own = [a for a in leaf.axes if a in flat]
  return piece.reshape([sizes[n] for n in flat]).transpose([flat.index(a) for a in own])


def _turn_back(value: np.ndarray, part: Part, leaf: Leaf) -> np.ndarray:
  flat = [n for group in _names(part.dims) for n in group if n != '1']
  own = [a for a in leaf.axes if a in flat]
  return value.transpose([own.index(n) for n in flat]).reshape(_own_shape(part, leaf))
