"""Splash attention: block-sparse flash attention on TPU, one shard per device.

Letters: B batch, L length, H query heads, G key/value heads, K head_dim.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from partitioning import rules


def _one_shard(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, *,
               window: int | None, softcap: float | None, interpret: bool) -> jax.Array:
  # Importing Pallas costs 0.13 s, which only runs that use the kernel should pay.
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
  length, heads, groups = q.shape[1], q.shape[2], k.shape[2]
  repeat = heads // groups
  if repeat > 1:
    k, v = jnp.repeat(k, repeat, 2), jnp.repeat(v, repeat, 2)
  block = min(512, length)
  sizes = kernel.BlockSizes(
      block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block,
      block_kv_dkv=block, block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block)
  one = (masks.CausalMask((length, length)) if window is None
         else masks.LocalMask((length, length), window_size=(window - 1, 0), offset=0))
  run = kernel.make_splash_mha_single_device(
      masks.MultiHeadMask([one] * heads), block_sizes=sizes, attn_logits_soft_cap=softcap,
      interpret=interpret)
  ids = None if segments is None else kernel.SegmentIds(q=segments, kv=segments)
  axis = None if segments is None else kernel.SegmentIds(q=0, kv=0)  # pyright: ignore
  q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
  out: Any = jax.vmap(run, in_axes=(0, 0, 0, axis))(q, k, v, ids)
  return out.transpose(0, 2, 1, 3)


def attend(q: Float[Array, 'B L H K'], k: Float[Array, 'B L G K'], v: Float[Array, 'B L G K'],
           segments: Int[Array, 'B L'] | None, *, window: int | None = None,
           softcap: float | None = None) -> Float[Array, 'B L H K']:
  """Causal attention within segments by the splash kernel.

  Args:
    q: queries, already scaled; L a multiple of 128.
    k: keys.
    v: values.
    segments: segment of each token, or None for one segment.
    window: keys a query sees, its own included; None: all before it.
    softcap: cap of tanh soft capping of the scores; None: uncapped.
  Returns:
    [B, L, H, K] in the dtype of `q`. Off a TPU the kernel is interpreted: correct, and slow.
  """
  one = functools.partial(_one_shard, window=window, softcap=softcap,
                          interpret=jax.default_backend() != 'tpu')
  return rules.per_shard(
      one, (q, k, v, segments),
      ins=(('batch', 'length', 'heads', 'head_dim'), ('batch', 'length', 'kv_heads', 'head_dim'),
           ('batch', 'length', 'kv_heads', 'head_dim'), ('batch', 'length')),
      out=('batch', 'length', 'heads', 'head_dim'))
