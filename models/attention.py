"""Attention through one door: masks, grouped heads and the choice of kernel.

Letters: B batch, L query length, S key length, H query heads, G key/value heads, R = H / G,
K head_dim, D embed.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from models import layers, positions, splash
from models.config import DecoderConfig, Kernel
from partitioning import rules

MASKED = -1e30


@dataclasses.dataclass(frozen=True)
class Mask:
  """Who may attend to whom, described rather than materialised.

  Attributes:
    queries: [B, L] int32 segment of each query, or None for one segment.
    keys: [B, S] int32 segment of each key, or None.
    offset: slot of the first query among the keys: a python int, or [] int32 while decoding.
  """

  queries: Int[Array, 'B L'] | None
  keys: Int[Array, 'B S'] | None
  offset: int | Int[Array, ''] = 0

  def dense(self, length: int, keys: int) -> Bool[Array, 'B 1 L S']:
    """The mask as booleans: causal, and within one segment."""
    q_slot = jnp.arange(length, dtype=jnp.int32)[:, None] + self.offset
    allowed = (q_slot >= jnp.arange(keys, dtype=jnp.int32)[None, :])[None, None]
    if self.queries is None or self.keys is None:
      return allowed
    return allowed & (self.queries[:, None, :, None] == self.keys[:, None, None, :])


def reference(q: Float[Array, 'B L H K'], k: Float[Array, 'B S G K'], v: Float[Array, 'B S G K'],
              mask: Mask, slopes: Float[Array, ' H'] | None) -> Float[Array, 'B L H K']:
  """Plain softmax attention with float32 scores, heads leading so every product is canonical.

  Args:
    q: queries, already scaled.
    mask: causal and segment structure.
    slopes: ALiBi slope per head, or None.
  """
  batch, length, heads, width = q.shape
  keys, groups = k.shape[1], k.shape[2]
  repeat = heads // groups
  q = q.reshape(batch, length, groups, repeat, width).transpose(0, 2, 3, 1, 4)
  k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
  bias = None
  if slopes is not None:
    bias = alibi_bias(mask, length, keys, slopes).reshape(1, groups, repeat, length, keys)
  out = weighted(q, k, v, mask.dense(length, keys)[:, :, None], bias)
  return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, width)


@jax.custom_vjp
def weighted(q: Float[Array, 'B G R L K'], k: Float[Array, 'B G S K'], v: Float[Array, 'B G S K'],
             allowed: Bool[Array, '#B 1 1 L S'], bias: Float[Array, '1 G R L S'] | None
             ) -> Float[Array, 'B G R L K']:
  """softmax(q k + bias) v with float32 scores; its backward pass keeps the weights alone.

  Differentiated by rule (Dao et al. 2022, arXiv:2205.14135, appendix B.2) rather than by tracing:
  scores, exponentials and masks need not be kept, and every product has one contracting dimension.
  The bias gets no gradient.
  """
  return _weighted_forward(q, k, v, allowed, bias)[0]


def _weighted_forward(q, k, v, allowed, bias):
  scores = jnp.einsum('bgrlk,bgsk->bgrls', q, k).astype(jnp.float32)
  if bias is not None:
    scores = scores + bias
  weights = jax.nn.softmax(jnp.where(allowed, scores, MASKED), -1).astype(q.dtype)
  out = jnp.einsum('bgrls,bgsk->bgrlk', weights, v)
  return out, (q, k, v, weights, out)


def _weighted_backward(kept, grad):
  q, k, v, weights, out = kept
  grad_v = jnp.einsum('bgrls,bgrlk->bgsk', weights, grad)
  grad_weights = jnp.einsum('bgrlk,bgsk->bgrls', grad, v).astype(jnp.float32)
  mean = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), -1, keepdims=True)
  grad_scores = (weights.astype(jnp.float32) * (grad_weights - mean)).astype(q.dtype)
  grad_q = jnp.einsum('bgrls,bgsk->bgrlk', grad_scores, k)
  grad_k = jnp.einsum('bgrls,bgrlk->bgsk', grad_scores, q)
  return grad_q, grad_k, grad_v, None, None


weighted.defvjp(_weighted_forward, _weighted_backward)


def alibi_bias(mask: Mask, length: int, keys: int, slopes: Float[Array, ' H']
               ) -> Float[Array, '1 H L S']:
  """slope x (key slot - query slot): zero on the diagonal, more negative further back."""
  q_slot = jnp.arange(length, dtype=jnp.int32)[:, None] + mask.offset
  distance = (jnp.arange(keys, dtype=jnp.int32)[None, :] - q_slot).astype(jnp.float32)
  return slopes.reshape(1, -1, 1, 1) * distance[None, None]


def choose(kernel: Kernel, *, length: int, keys: int) -> Kernel:
  """The kernel 'auto' stands for: splash on TPU for whole tiles, cuDNN's on GPU, else reference."""
  if kernel != 'auto':
    return kernel
  backend = jax.default_backend()
  if backend == 'tpu' and length == keys and length % 128 == 0:
    return 'splash'
  return 'dot_product' if backend == 'gpu' and length > 1 else 'reference'


def attend(q: Float[Array, 'B L H K'], k: Float[Array, 'B S G K'], v: Float[Array, 'B S G K'], *,
           mask: Mask, slopes: Float[Array, ' H'] | None, kernel: Kernel
           ) -> Float[Array, 'B L H K']:
  """Attention of queries over keys with the chosen kernel; scaling by head_dim ** -0.5 included.

  Args:
    q: queries; k, v: keys and values, grouped when G < H.
    mask: causal and segment structure.
    slopes: ALiBi slope per head, or None.
    kernel: implementation; every one computes the same function.
  Returns:
    [B, L, H, K] in the dtype of `q`. Rows whose keys are all masked hold arbitrary finite values.
  """
  width, length, keys = q.shape[-1], q.shape[1], k.shape[1]
  chosen = choose(kernel, length=length, keys=keys)
  if chosen == 'splash':
    if slopes is not None or not isinstance(mask.offset, int):
      raise ValueError("kernel='splash' has neither ALiBi nor decoding; use kernel='reference'")
    return splash.attend(q * width**-0.5, k, v, mask.queries)
  if chosen == 'dot_product':
    bias = None if slopes is None else alibi_bias(mask, length, keys, slopes).astype(q.dtype)
    plain = mask.queries is None and isinstance(mask.offset, int) and mask.offset == 0
    return jax.nn.dot_product_attention(
        q, k, v, bias=bias, mask=None if plain else mask.dense(length, keys), is_causal=plain,
        implementation='cudnn' if jax.default_backend() == 'gpu' and q.dtype.itemsize == 2
        else None)
  return reference(q * jnp.asarray(width**-0.5, q.dtype), k, v, mask, slopes)


class Attention(nnx.Module):
  """Multi-head, grouped or multi-query self-attention."""

  def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, *, out_scale: float = 1.0):
    self.config = config
    embed, width = {'embed': config.embed}, {'head_dim': config.width_of_head}
    heads, kv = {'heads': config.heads}, {'kv_heads': config.num_kv_heads}
    bias = 'qkv' in config.biases
    self.query = layers.Dense(rngs, ins=embed, outs={**heads, **width}, bias=bias)
    self.key = layers.Dense(rngs, ins=embed, outs={**kv, **width}, bias=bias)
    self.value = layers.Dense(rngs, ins=embed, outs={**kv, **width}, bias=bias)
    self.out = layers.Dense(rngs, ins={**heads, **width}, outs=embed, bias='out' in config.biases,
                            scale=out_scale)

  def __call__(self, x: Float[Array, 'B L D'], *, mask: Mask, rotary: tuple | None,
               cached: tuple[jax.Array, jax.Array] | None
               ) -> tuple[Float[Array, 'B L D'], tuple[jax.Array, jax.Array] | None]:
    """Self-attention over this row, or over the cache while decoding.

    Args:
      x: normalised residual stream.
      mask: described for the keys actually attended to (the cache's when decoding).
      rotary: cosine and sine tables, or None.
      cached: keys and values [B, S, G, K] of this layer, or None.
    Returns:
      The output and the updated keys and values (None without a cache).
    """
    config = self.config
    q = self.query(x, ('heads', 'head_dim'))
    k = self.key(x, ('kv_heads', 'head_dim'))
    v = self.value(x, ('kv_heads', 'head_dim'))
    if rotary is not None:
      q, k = positions.rotate(q, *rotary), positions.rotate(k, *rotary)
    if cached is not None:
      write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, mask.offset, 1)
      k, v = cached = (write(cached[0], k), write(cached[1], v))
    slopes = None
    if config.position == 'alibi':
      slopes = jnp.asarray(positions.alibi_slopes(config.heads), jnp.float32)
    out = attend(q, k, v, mask=mask, slopes=slopes, kernel=config.kernel)
    out = rules.constrain(out, 'batch', 'length', 'heads', 'head_dim')
    return self.out(out, ('embed',)), cached
