"""Rotary positions and their scalings, ALiBi slopes and learned positions.

Letters: B batch, L length, H heads, K head_dim, D embed, R rotating pairs.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from models import layers
from models.config import DecoderConfig, RopeScaling

Rotary = tuple[jax.Array, jax.Array]


def rotary_tables(config: DecoderConfig, positions: Int[Array, 'B L']
                  ) -> tuple[Rotary | None, Rotary | None]:
  """Cosine and sine tables for global and for local layers; (None, None) without rotation.

  Args:
    config: the rotation's settings.
    positions: position of each token in its document.
  """
  if config.position != 'rope':
    return None, None
  table = rotary_table(positions, config.rotary_dim, config.rope_theta, config.rope_scaling)
  if config.local_rope_theta is None:
    return table, table
  return table, rotary_table(positions, config.rotary_dim, config.local_rope_theta,
                             config.local_rope_scaling)


def rotary_table(positions: Int[Array, 'B L'], rotary_dim: int, theta: float,
                 scaling: RopeScaling | None = None
                 ) -> tuple[Float[Array, 'B L 1 R'], Float[Array, 'B L 1 R']]:
  """Cosine and sine of the rotary angles, float32.

  Args:
    positions: position of each token in its document.
    rotary_dim: rotating dimensions per head; R is half of it, rounded up.
    theta: base of the frequencies.
    scaling: for rows longer than those of the first training.
  """
  # In float64 on the host, so that no backend's pow decides.
  plain = frequencies(rotary_dim, theta)
  factor = 1.0
  if scaling is None:
    speeds: jax.Array | np.ndarray = plain
  else:
    factor = scaling.attention_factor
    speeds = scaled_frequencies(plain, theta, scaling, positions)
  speeds = jnp.asarray(speeds, jnp.float32)
  angles = positions[:, :, None, None].astype(jnp.float32) * speeds.reshape(1, 1, 1, -1)
  return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def frequencies(rotary_dim: int, theta: float) -> np.ndarray:
  """theta ** (-2i / rotary_dim) for i = 0 ... R - 1, float64."""
  return float(theta) ** (-np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)


def scaled_frequencies(plain: np.ndarray, theta: float, scaling: RopeScaling,
                       positions: Int[Array, 'B L']) -> np.ndarray | jax.Array:
  """Rotary frequencies under a scaling.

  'dynamic' and 'longrope' depend on the longest row of the batch, as their references do.

  Args:
    plain: [R] unscaled frequencies.
    theta: their base.
    scaling: which, and its numbers.
    positions: of the batch.
  Returns:
    [R] frequencies.
  """
  if scaling.kind == 'linear':
    return plain / scaling.factor
  original = scaling.original_length
  assert original is not None
  if scaling.kind == 'llama3':
    wave = 2 * math.pi / plain
    share = original / wave
    smooth = np.clip((share - scaling.low_frequency)
                     / (scaling.high_frequency - scaling.low_frequency), 0, 1)
    return (1 - smooth) * plain / scaling.factor + smooth * plain
  if scaling.kind == 'yarn':
    return _yarn(plain, theta, scaling, original)
  row = jnp.max(positions) + 1
  if scaling.kind == 'longrope':
    short, long = plain / np.array(scaling.short_factors), plain / np.array(scaling.long_factors)
    return jnp.where(row > original, jnp.asarray(long, jnp.float32),
                     jnp.asarray(short, jnp.float32))
  dims = 2 * len(plain)
  grown = scaling.factor * jnp.maximum(row, original) / original - (scaling.factor - 1)
  base = theta * grown.astype(jnp.float32) ** (dims / (dims - 2))
  return base ** jnp.asarray(-np.arange(0, dims, 2) / dims, jnp.float32)


def _yarn(plain: np.ndarray, theta: float, scaling: RopeScaling, original: int) -> np.ndarray:
  dims = 2 * len(plain)

  def place(turns: float) -> float:
    """The (fractional) pair that turns so often over the original length."""
    return dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

  low, high = place(scaling.beta_fast), place(scaling.beta_slow)
  if scaling.truncate == 'ends':
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, dims - 1)
  # Where the ramp is a step; where its ends have changed places, as the reference has it.
  rise = high - low or 1e-3
  ramp = np.clip((np.arange(len(plain)) - low) / rise, 0, 1)
  return plain / scaling.factor * ramp + plain * (1 - ramp)


def rotate(x: Float[Array, 'B L H K'], cos: Float[Array, 'B L 1 R'], sin: Float[Array, 'B L 1 R'],
           *, layout: str = 'halves') -> Float[Array, 'B L H K']:
  """Rotates pairs of the first 2R head dimensions (arXiv:2104.09864), in float32.

  Args:
    x: queries or keys.
    cos: cosines of the angles.
    sin: sines.
    layout: 'halves' pairs i with i + R, as GPT-NeoX and Llama; 'neighbours' 2i with 2i + 1, as
      the paper and GPT-J.
  """
  half = cos.shape[-1]
  turning = x[..., :2 * half].astype(jnp.float32)
  if layout == 'neighbours':
    first, second = turning[..., ::2], turning[..., 1::2]
  else:
    first, second = turning[..., :half], turning[..., half:]
  turned = [first * cos - second * sin, second * cos + first * sin]
  out = (jnp.stack(turned, -1).reshape(turning.shape) if layout == 'neighbours'
         else jnp.concatenate(turned, -1)).astype(x.dtype)
  rest = x[..., 2 * half:]
  return jnp.concatenate([out, rest], -1) if rest.shape[-1] else out


def alibi_slopes(heads: int, order: str = 'paper', most: float = 8.0) -> list[float]:
  """ALiBi's slope per head (arXiv:2108.12409).

  Args:
    heads: H.
    order: for H that is no power of two, 'paper' takes the next lower power's slopes and then
      every other one of the next higher's; 'mpt' the higher's odd ones, then its even ones.
    most: the smallest slope of a power of two is 2 ** -most.
  """
  def powers(n: int) -> list[float]:
    return [2.0 ** (-most * (i + 1) / n) for i in range(n)]
  below = 2 ** math.floor(math.log2(heads))
  if below == heads:
    return powers(heads)
  above = powers(2 * below)
  if order == 'mpt':
    return (above[1::2] + above[0::2])[:heads]
  return powers(below) + above[0::2][:heads - below]


class LearnedPositions(nnx.Module):
  """A table of position embeddings, added to the embedded tokens."""

  def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
    value = 0.02 * jax.random.normal(rngs.params(), (config.max_length, config.embed), jnp.float32)
    self.embedding = layers.param(value, ('position', 'embed'))

  def __call__(self, positions: Int[Array, 'B L'], dtype: jnp.dtype) -> Float[Array, 'B L D']:
    hot = jax.nn.one_hot(positions, self.embedding.shape[0], dtype=dtype)
    table = layers.rules.gathered(self.embedding[...], 'position', 'embed').astype(dtype)
    return layers.rules.project(hot, table, ('batch', 'length', 'embed'))


def buckets_of(distance: np.ndarray, *, buckets: int, longest: int) -> np.ndarray:
  """Buckets of distances (T5, arXiv:1910.10683): one each for the nearest half, then logarithmic.

  Args:
    distance: integers of at least 0.
    buckets: how many; the last holds every distance from `longest` on.
    longest: above buckets // 2.
  Returns:
    Integers in [0, buckets).
  """
  exact = buckets // 2
  far = np.log(np.maximum(distance, exact) / exact) / math.log(longest / exact)
  # Where a boundary is a whole number, rounding must not put it into the bucket before.
  logarithmic = exact + np.floor(far * (buckets - exact) + 1e-6).astype(np.int64)
  return np.where(distance < exact, distance, np.minimum(logarithmic, buckets - 1))


class RelativePositions(nnx.Module):
  """A learned bias of the scores per head and bucket of distances, shared by all layers.

  Attributes:
    embedding: [buckets, H]; where both directions are seen, the second half is for later keys.
  """

  def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, order: Literal['causal', 'any']):
    count, longest = config.relative_buckets, config.relative_distance
    near = np.arange(longest + 1)
    if order == 'causal':
      before = buckets_of(near, buckets=count, longest=longest)
      after = np.zeros_like(before)
    else:
      before = buckets_of(near, buckets=count // 2, longest=longest)
      after = np.where(near > 0, before + count // 2, before)
    # Bucket of the distance d = key - query at d + longest.
    self.buckets = tuple(np.concatenate([before[:0:-1], after]).tolist())
    value = config.embed**-0.5 * jax.random.normal(rngs.params(), (count, config.heads))
    self.embedding = layers.param(value, ('buckets', 'heads'))

  def __call__(self, length: int, keys: int, offset: int | Int[Array, ''] = 0
               ) -> Float[Array, '1 H L S']:
    """The bias of every score.

    Args:
      length: L, queries.
      keys: S.
      offset: slot of the first query among the keys.
    """
    around, longest = length + keys, len(self.buckets) // 2
    at = jnp.arange(around, dtype=jnp.int32)
    distance = jnp.where(at < keys, at, at - around) - offset
    bucket = jnp.asarray(self.buckets, jnp.int32)[jnp.clip(distance, -longest, longest) + longest]
    table = layers.rules.gathered(self.embedding[...], 'buckets', 'heads')
    hot = jax.nn.one_hot(bucket, table.shape[0], dtype=jnp.float32)
    row = layers.rules.project(hot, table, ('position', 'heads')).T
    # Row i is the first row moved i to the right. Repeating one entry too many moves by one each
    # time, so that no gather is needed, and no scatter on the way back.
    heads = row.shape[0]
    moved = jnp.broadcast_to(row[:, None], (heads, length, around)).reshape(heads, -1)
    moved = moved[:, :length * (around - 1)].reshape(heads, length, around - 1)
    return moved[None, :, :, :keys]
