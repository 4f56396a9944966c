"""Attention through one door: masks, grouped heads and the choice of kernel.

Letters: B batch, L query length, S key length, H query heads, G key/value heads, R = H / G,
K head_dim, D embed.
"""

import dataclasses
import functools
from typing import Literal

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
    order: 'causal' hides later slots; 'any' hides none.
    window: slots a query sees, its own included; None: all.
    windowed: whether the window holds: a python bool, or [] bool where layers of both kinds are
      scanned over.
    prefix: [B, S] int32, above 0 for keys of a prefix, which the order hides from no query of their
      segment (prefix LM, T5, arXiv:1910.10683, section 3.2.1); None: there is none.
  """

  queries: Int[Array, 'B L'] | None
  keys: Int[Array, 'B S'] | None
  offset: int | Int[Array, ''] = 0
  order: Literal['causal', 'any'] = 'causal'
  window: int | None = None
  windowed: bool | Bool[Array, ''] = False
  prefix: Int[Array, 'B S'] | None = None

  def dense(self, length: int, keys: int) -> Bool[Array, '#B 1 L S']:
    """The mask as booleans: the order, the window, and within one segment."""
    ahead = (jnp.arange(length, dtype=jnp.int32)[:, None] + self.offset
             - jnp.arange(keys, dtype=jnp.int32)[None, :])
    allowed = ahead >= 0 if self.order == 'causal' else jnp.ones((length, keys), bool)
    allowed = allowed[None, None]
    if self.prefix is not None:
      allowed = allowed | (self.prefix > 0)[:, None, None, :]
    if self.window is not None and self.windowed is not False:
      near = (jnp.abs(ahead) < self.window)[None, None]
      allowed &= near if self.windowed is True else near | ~jnp.asarray(self.windowed)
    if self.queries is None or self.keys is None:
      return allowed
    return allowed & (self.queries[:, None, :, None] == self.keys[:, None, None, :])

  @property
  def plain(self) -> bool:
    """Whether it is no more than causal over a row, perhaps with a fixed window."""
    return (self.queries is None and self.order == 'causal' and self.prefix is None
            and isinstance(self.offset, int) and self.offset == 0
            and isinstance(self.windowed, bool))

  @property
  def fixed_window(self) -> int | None:
    """The window, where it is known to hold."""
    return self.window if self.windowed is True else None


@dataclasses.dataclass(frozen=True)
class Memory:
  """What an encoder leaves for the layers of a decoder to read.

  Attributes:
    states: [B, S, D], of which each layer makes keys and values; or None where they are given.
    keys_values: keys and values [B, S, G, K] of a layer, or [N, B, S, G, K] of all.
    mask: who reads what.
  """

  mask: Mask
  states: Float[Array, 'B S D'] | None = None
  keys_values: tuple[jax.Array, jax.Array] | None = None


def reference(q: Float[Array, 'B L H K'], k: Float[Array, 'B S G K'], v: Float[Array, 'B S G K'],
              mask: Mask, bias: Float[Array, '#B H #L S'] | None, *, softcap: float | None = None
              ) -> Float[Array, 'B L H K']:
  """Plain softmax attention with float32 scores, heads leading so every product is canonical.

  Args:
    q: queries, already scaled.
    k: keys.
    v: values.
    mask: causal and segment structure.
    bias: added to the scores, or None.
    softcap: cap of tanh soft capping of the scores, before the bias; None: uncapped.
  """
  batch, length, heads, width = q.shape
  keys, groups = k.shape[1], k.shape[2]
  repeat = heads // groups
  q = q.reshape(batch, length, groups, repeat, width).transpose(0, 2, 3, 1, 4)
  k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
  if bias is not None:
    bias = bias.reshape(bias.shape[0], groups, repeat, bias.shape[2], keys)
  out: jax.Array = weighted((q, k, v), mask.dense(length, keys)[:, :, None], bias, softcap)
  return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def weighted(qkv: tuple[jax.Array, jax.Array, jax.Array], allowed: Bool[Array, '#B 1 1 L S'],
             bias: Float[Array, '#B G R #L S'] | None, softcap: float | None
             ) -> Float[Array, 'B G R L K']:
  """softmax(cap(q k) + bias) v with float32 scores; its backward pass keeps the weights alone.

  Differentiated by rule (Dao et al. 2022, arXiv:2205.14135, appendix B.2) rather than by tracing:
  scores, exponentials and masks need not be kept, and every product has one contracting dimension.
  Scores are computed again only where they are capped.

  Args:
    qkv: queries [B, G, R, L, K], keys and values [B, G, S, K].
    allowed: who may attend to whom.
    bias: added to the scores, or None.
    softcap: cap of the scores, or None.
  """
  return _weighted_forward(qkv, allowed, bias, softcap)[0]


def _weighted_forward(qkv, allowed, bias, softcap):
  q, k, v = qkv
  scores = jnp.einsum('bgrlk,bgsk->bgrls', q, k).astype(jnp.float32)
  if softcap is not None:
    scores = jnp.tanh(scores / softcap) * softcap
  if bias is not None:
    scores = scores + bias
  weights = jax.nn.softmax(jnp.where(allowed, scores, MASKED), -1).astype(q.dtype)
  out = jnp.einsum('bgrls,bgsk->bgrlk', weights, v)
  return out, (q, k, v, weights, out, bias)


def _weighted_backward(softcap, kept, grad):
  q, k, v, weights, out, bias = kept
  grad_v = jnp.einsum('bgrls,bgrlk->bgsk', weights, grad)
  grad_weights = jnp.einsum('bgrlk,bgsk->bgrls', grad, v).astype(jnp.float32)
  mean = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), -1, keepdims=True)
  grad_scores = weights.astype(jnp.float32) * (grad_weights - mean)
  grad_bias = None
  if bias is not None:
    over = tuple(i for i, size in enumerate(bias.shape) if size == 1)
    grad_bias = jnp.sum(grad_scores, over, keepdims=True).astype(bias.dtype)
  if softcap is not None:
    scores = jnp.einsum('bgrlk,bgsk->bgrls', q, k).astype(jnp.float32)
    grad_scores = grad_scores * (1 - jnp.square(jnp.tanh(scores / softcap)))
  grad_scores = grad_scores.astype(q.dtype)
  grad_q = jnp.einsum('bgrls,bgsk->bgrlk', grad_scores, k)
  grad_k = jnp.einsum('bgrls,bgrlk->bgsk', grad_scores, q)
  return (grad_q, grad_k, grad_v), None, grad_bias


weighted.defvjp(_weighted_forward, _weighted_backward)


def alibi_bias(mask: Mask, length: int, keys: int, slopes: Float[Array, ' H']
               ) -> Float[Array, '1 H L S']:
  """-slope x |key slot - query slot|: zero on the diagonal, more negative further away."""
  q_slot = jnp.arange(length, dtype=jnp.int32)[:, None] + mask.offset
  distance = jnp.abs(jnp.arange(keys, dtype=jnp.int32)[None, :] - q_slot).astype(jnp.float32)
  return -slopes.reshape(1, -1, 1, 1) * distance[None, None]


def rounded_alibi_bias(mask: Mask, keys: int, slopes: Float[Array, ' H']
                       ) -> Float[Array, '#B H 1 S']:
  """slope x place of the key in its segment, both and their product rounded to bfloat16.

  Without rounding, softmax makes it equal to `alibi_bias`; Falcon's reference rounds.
  """
  place = jnp.arange(keys, dtype=jnp.int32)[None]
  if mask.keys is not None:
    new = jnp.concatenate([jnp.zeros_like(mask.keys[:, :1], bool),
                           mask.keys[:, 1:] != mask.keys[:, :-1]], 1)
    place = place - jax.lax.cummax(jnp.where(new, place, 0), axis=1)
  product = slopes.astype(jnp.bfloat16)[None, :, None] * place.astype(jnp.bfloat16)[:, None, :]
  return product.astype(jnp.float32)[:, :, None, :]


def choose(kernel: Kernel, *, length: int, keys: int, mask: Mask, bias: bool = False,
           softcap: float | None = None) -> Kernel:
  """The kernel 'auto' stands for: splash on TPU for whole tiles, cuDNN's on GPU, else reference."""
  if kernel != 'auto':
    return kernel
  backend = jax.default_backend()
  if not isinstance(mask.windowed, bool):
    return 'reference'
  if backend == 'tpu' and length == keys and length % 128 == 0 and not bias:
    causal = mask.order == 'causal' and mask.prefix is None
    return 'splash' if causal and isinstance(mask.offset, int) else 'reference'
  return 'dot_product' if backend == 'gpu' and length > 1 and softcap is None else 'reference'


def attend(q: Float[Array, 'B L H K'], k: Float[Array, 'B S G K'], v: Float[Array, 'B S G K'], *,
           mask: Mask, kernel: Kernel, bias: Float[Array, '#B H #L S'] | None = None,
           scale: float | None = None, softcap: float | None = None) -> Float[Array, 'B L H K']:
  """Attention of queries over keys with the chosen kernel.

  Args:
    q: queries.
    k: keys, grouped when G < H.
    v: values.
    mask: order, window and segment structure.
    kernel: implementation; every one computes the same function.
    bias: added to the scores, or None.
    scale: multiplies the scores; None means head_dim ** -0.5.
    softcap: cap of tanh soft capping of the scores, before the bias; None: uncapped.
  Returns:
    [B, L, H, K] in the dtype of `q`. Rows whose keys are all masked hold arbitrary finite values.
  Raises:
    ValueError: the kernel lacks what is asked of it.
  """
  length, keys = q.shape[1], k.shape[1]
  scale = q.shape[-1]**-0.5 if scale is None else scale
  chosen = choose(kernel, length=length, keys=keys, mask=mask, bias=bias is not None,
                  softcap=softcap)
  if chosen == 'splash':
    if (bias is not None or mask.order != 'causal' or mask.prefix is not None
        or not isinstance(mask.offset, int) or not isinstance(mask.windowed, bool)):
      raise ValueError("kernel='splash' has no bias such as ALiBi, no prefix that is seen in both "
                       "directions, no decoding, and no layers of both kinds in one scan; use "
                       "kernel='auto', or layer_loop='unroll'")
    return splash.attend(q * jnp.asarray(scale, q.dtype), k, v, mask.queries,
                         window=mask.fixed_window, softcap=softcap)
  if chosen == 'dot_product':
    if softcap is not None:
      raise ValueError("kernel='dot_product' has no soft cap; use kernel='auto'")
    window = mask.fixed_window
    plain = mask.plain and length == keys
    return jax.nn.dot_product_attention(
        q, k, v, bias=None if bias is None else bias.astype(q.dtype),
        mask=None if plain else mask.dense(length, keys), is_causal=plain, scale=scale,
        local_window_size=None if not plain or window is None else (window - 1, 0),
        implementation='cudnn' if jax.default_backend() == 'gpu' and q.dtype.itemsize == 2
        else None)
  return reference(q * jnp.asarray(scale, q.dtype), k, v, mask, bias, softcap=softcap)


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
    each = {'none': None, 'head': (width, width), 'all': ({**heads, **width}, {**kv, **width})}
    dims = each[config.qk_norm]
    self.query_norm = None if dims is None else layers.Norm(config, dims[0])
    self.key_norm = None if dims is None else layers.Norm(config, dims[1])

  def __call__(self, x: Float[Array, 'B L D'], *, mask: Mask, rotary: positions.Rotary | None,
               cached: tuple[jax.Array, jax.Array] | None,
               bias: Float[Array, '#B H #L S'] | None = None, depth: Float[Array, ''] | None = None
               ) -> tuple[Float[Array, 'B L D'], tuple[jax.Array, jax.Array] | None]:
    """Self-attention over this row, or over the cache while decoding.

    Args:
      x: normalised residual stream.
      mask: described for the keys actually attended to (the cache's when decoding).
      rotary: cosine and sine tables, or None.
      cached: keys and values [B, S, G, K] of this layer, or None.
      bias: added to the scores, or None.
      depth: divides the scores, or None.
    Returns:
      The output and the updated keys and values (None without a cache).
    """
    config = self.config
    q, (k, v) = self._queries(x), self.keys_values(x)
    if depth is not None:
      q = (q.astype(jnp.float32) / depth).astype(q.dtype)
    if rotary is not None:
      q, k = (positions.rotate(a, *rotary, layout=config.rope_layout) for a in (q, k))
    if cached is not None:
      write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, mask.offset, 1)
      k, v = cached = (write(cached[0], k), write(cached[1], v))
    if config.position == 'alibi':
      slopes = jnp.asarray(positions.alibi_slopes(config.heads, config.alibi_order,
                                                  config.alibi_max), jnp.float32)
      bias = config.alibi_scale * (
          alibi_bias(mask, q.shape[1], k.shape[1], slopes) if config.alibi_rounding == 'none'
          else rounded_alibi_bias(mask, k.shape[1], slopes))
    out = attend(q, k, v, mask=mask, kernel=config.kernel, bias=bias,
                 scale=config.attention_scale, softcap=config.attention_softcap)
    out = rules.constrain(out, 'batch', 'length', 'heads', 'head_dim')
    return self.out(out, ('embed',)), cached

  def read(self, x: Float[Array, 'B L D'], memory: Memory) -> Float[Array, 'B L D']:
    """Attention of this row over what an encoder left, without positions.

    Args:
      x: normalised residual stream.
      memory: states, or this layer's keys and values.
    """
    found = memory.keys_values
    if found is None:
      assert memory.states is not None
      found = self.keys_values(memory.states)
    out = attend(self._queries(x), *found, mask=memory.mask, kernel=self.config.kernel,
                 scale=self.config.attention_scale, softcap=self.config.attention_softcap)
    out = rules.constrain(out, 'batch', 'length', 'heads', 'head_dim')
    return self.out(out, ('embed',))

  def keys_values(self, x: Float[Array, 'B S D']
                  ) -> tuple[Float[Array, 'B S G K'], Float[Array, 'B S G K']]:
    """Keys and values, before rotation."""
    k = self._clipped(self.key(x, ('kv_heads', 'head_dim')))
    v = self._clipped(self.value(x, ('kv_heads', 'head_dim')))
    return k if self.key_norm is None else self.key_norm(k), v

  def _queries(self, x):
    q = self._clipped(self.query(x, ('heads', 'head_dim')))
    return q if self.query_norm is None else self.query_norm(q)

  def _clipped(self, x):
    limit = self.config.clip_qkv
    return x if limit is None else jnp.clip(x, -limit, limit)
