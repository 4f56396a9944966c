"""How a checkpoint's arrays are cut into chunks: what is read alone is stored alone."""

import math
from collections.abc import Sequence
from typing import Any

import orbax.checkpoint as ocp

LARGEST = 32 << 20  # bytes of a chunk that holds more than one layer
_LAYERS = 512  # an axis with more entries counts something else


def save_args(x: Any) -> ocp.SaveArgs:
  """How Orbax stores an array: a large stack layer by layer, everything else in one chunk a shard.

  Reading one layer, or exporting, then never needs a whole stack in memory.

  Args:
    x: array, with or without a sharding.
  """
  sharding = getattr(x, 'sharding', None)
  shard = x.shape if sharding is None else sharding.shard_shape(x.shape)
  return ocp.SaveArgs(shard_axes=stacked(shard, x.dtype.itemsize))


def stacked(shard: Sequence[int], itemsize: int) -> tuple[int, ...]:
  """The leading axes (layers, experts) whose entries are chunks of their own.

  Args:
    shard: shape of one device's part.
    itemsize: bytes of an element.
  """
  axes: list[int] = []
  # The last two axes are those of a matrix.
  for axis in range(len(shard) - 2):
    if math.prod(shard[axis:]) * itemsize <= LARGEST or shard[axis] > _LAYERS:
      break
    axes.append(axis)
  return tuple(axes)
