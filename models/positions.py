"""Rotary positions, ALiBi slopes and learned positions.

Letters: B batch, L length, H heads, K head_dim, D embed.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models import layers
from models.config import DecoderConfig


def rotary_table(positions: Int[Array, 'B L'], rotary_dim: int, theta: float
                 ) -> tuple[Float[Array, 'B L 1 R'], Float[Array, 'B L 1 R']]:
  """Cosine and sine of the rotary angles, float32.

  Args:
    positions: position of each token in its document.
    rotary_dim: rotating dimensions per head (even); R is half of it.
    theta: base of the frequencies.
  """
  half = rotary_dim // 2
  frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angles = positions[:, :, None, None].astype(jnp.float32) * frequencies.reshape(1, 1, 1, half)
  return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, 'B L H K'], cos: Float[Array, 'B L 1 R'], sin: Float[Array, 'B L 1 R']
           ) -> Float[Array, 'B L H K']:
  """Rotates the two halves of the first 2R head dimensions (arXiv:2104.09864), in float32.

  Halves are paired as in GPT-NeoX and Llama, not neighbours as in the paper and GPT-J.
  """
  half = cos.shape[-1]
  first, second = x[..., :half].astype(jnp.float32), x[..., half:2 * half].astype(jnp.float32)
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
  rest = x[..., 2 * half:]
  turned = turned.astype(x.dtype)
  return jnp.concatenate([turned, rest], -1) if rest.shape[-1] else turned


def alibi_slopes(heads: int) -> list[float]:
  """ALiBi's slope per head (arXiv:2108.12409); odd counts interleave the next power of two's."""
  def powers(n: int) -> list[float]:
    return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]
  below = 2 ** math.floor(math.log2(heads))
  slopes = powers(below)
  return slopes if below == heads else slopes + powers(2 * below)[0::2][:heads - below]


class LearnedPositions(nnx.Module):
  """A table of position embeddings, added to the embedded tokens."""

  def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
    value = 0.02 * jax.random.normal(rngs.params(), (config.max_length, config.embed), jnp.float32)
    self.embedding = layers.param(value, ('position', 'embed'))

  def __call__(self, positions: Int[Array, 'B L'], dtype: jnp.dtype) -> Float[Array, 'B L D']:
    hot = jax.nn.one_hot(positions, self.embedding.shape[0], dtype=dtype)
    table = layers.rules.gathered(self.embedding[...], 'position', 'embed').astype(dtype)
    return layers.rules.project(hot, table, ('batch', 'length', 'embed'))
