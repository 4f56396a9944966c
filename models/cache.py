"""Key/value caches for decoding: pure arrays, one entry per stacked layer.

Letters: N layers, B batch, S cache slots, G kv heads, K head_dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from models.config import DecoderConfig


class Cache(NamedTuple):
  """Keys and values seen so far.

  Attributes:
    key: [N, B, S, G, K] in the compute dtype.
    value: [N, B, S, G, K].
    segments: [B, S] int32, 0 where nothing was written or the token was padding.
    index: [] int32, slots written.
  """

  key: jax.Array
  value: jax.Array
  segments: jax.Array
  index: jax.Array


class EncDecCache(NamedTuple):
  """A decoder's own keys and values, and those of the encoder it reads.

  Attributes:
    own: of the decoder.
    key: [N, B, S, G, K] of the encoder's states, made once.
    value: [N, B, S, G, K].
    segments: [B, S] int32, 0 where the encoder's input is padding.
  """

  own: Cache
  key: jax.Array
  value: jax.Array
  segments: jax.Array


def empty(config: DecoderConfig, batch: int, length: int) -> Cache:
  """A cache with `length` free slots per row."""
  shape = (config.layers, batch, length, config.num_kv_heads, config.width_of_head)
  zeros = jnp.zeros(shape, jnp.dtype(config.dtype))
  return Cache(zeros, zeros, jnp.zeros((batch, length), jnp.int32), jnp.zeros((), jnp.int32))
