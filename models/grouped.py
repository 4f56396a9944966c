"""Matrix products of sorted rows, each group of rows with a matrix of its own.

Letters: M rows, E groups, I inputs, O outputs, N blocks, R rows of a block.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_ROWS = 128


def product(x: Float[Array, 'M I'], w: Float[Array, 'E I O'], sizes: Int[Array, 'E']
            ) -> Float[Array, 'M O']:
  """The first `sizes[0]` rows times `w[0]`, the next `sizes[1]` times `w[1]`, and so on.

  XLA's CPU backend multiplies all rows with all matrices and masks what is not wanted, so there
  rows are laid out in blocks that have one matrix each.

  Args:
    x: rows, sorted by group.
    w: one matrix per group.
    sizes: rows of each group; their sum is M.
  Returns:
    As `jax.lax.ragged_dot`, in the dtype of `x`.
  """
  return jax.lax.platform_dependent(x, w, sizes, cpu=blocked, default=jax.lax.ragged_dot)


def blocked(x: Float[Array, 'M I'], w: Float[Array, 'E I O'], sizes: Int[Array, 'E']
            ) -> Float[Array, 'M O']:
  """`product` by blocks of rows: no more than E blocks are added to those that M rows fill."""
  count, groups = x.shape[0], w.shape[0]
  rows = min(_ROWS, max(8, (count // groups) & ~7))
  per_group = -(-sizes // rows)
  ends = jnp.cumsum(per_group)
  blocks = -(-count // rows) + groups
  # Blocks after the last one hold zeros; whose matrix they meet does not matter.
  owner = jnp.minimum(_group_of(ends, blocks), groups - 1)
  group = _group_of(jnp.cumsum(sizes), count)
  first = (ends - per_group) * rows - (jnp.cumsum(sizes) - sizes)
  slot = first[group] + jnp.arange(count, dtype=jnp.int32)
  laid = jnp.zeros((blocks * rows, x.shape[1]), x.dtype).at[slot].set(x, unique_indices=True)
  out = _products(laid.reshape(blocks, rows, -1), w, owner)
  return out.reshape(blocks * rows, -1).at[slot].get(unique_indices=True)


def _group_of(ends: Int[Array, 'E'], count: int) -> Int[Array, 'count']:
  return jnp.searchsorted(ends, jnp.arange(count, dtype=jnp.int32), side='right')


@jax.custom_vjp
def _products(x: Float[Array, 'N R I'], w: Float[Array, 'E I O'], owner: Int[Array, 'N']
              ) -> Float[Array, 'N R O']:
  """Each block times its owner's matrix.

  The transpose of picking a matrix would add a gradient of the size of all of them per block.
  """
  return jax.lax.map(lambda item: jax.lax.dot(item[0], w[item[1]]), (x, owner))


def _products_forward(x: jax.Array, w: jax.Array, owner: jax.Array) -> tuple[jax.Array, Any]:
  return _products(x, w, owner), (x, w, owner)


def _products_backward(kept: Any, g: jax.Array) -> tuple[jax.Array, jax.Array, None]:
  x, w, owner = kept

  def one(dw: jax.Array, item: Any) -> tuple[jax.Array, jax.Array]:
    rows, grad, i = item
    wide = dw.at[i].add(jax.lax.dot(rows.T, grad, preferred_element_type=jnp.float32))
    return wide, jax.lax.dot(grad, w[i].T)

  dw, dx = jax.lax.scan(one, jnp.zeros(w.shape, jnp.float32), (x, g, owner))
  return dx, dw.astype(w.dtype), None


_products.defvjp(_products_forward, _products_backward)
