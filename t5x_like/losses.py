"""Losses as (sum, weight), so that a mean over real tokens is exact under any split.

Letters: B batch, L length, V vocab.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

Metrics = dict[str, tuple[jax.Array, jax.Array]]


class Loss(Protocol):
  """What a run needs of a loss: the sum over tokens, its weight, and metrics in the same form."""

  def __call__(self, module: Any, batch: Mapping[str, jax.Array], *,
               dropout_key: jax.Array | None) -> tuple[jax.Array, jax.Array, Metrics]: ...


def cross_entropy(logits: Float[Array, 'B L V'], targets: Int[Array, 'B L']
                  ) -> tuple[Float[Array, 'B L'], Float[Array, 'B L']]:
  """Negative log-likelihood of each target and the log of the normaliser, in float32.

  The target's logit is picked by comparison, not by gather, so a split vocabulary stays split.

  Args:
    logits: any float dtype.
    targets: ids in [0, V).
  Returns:
    -log p(target) in nats, and log Z.
  """
  logits = logits.astype(jnp.float32)
  log_z = jax.nn.logsumexp(logits, -1)
  ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
  hit = jnp.sum(jnp.where(targets[:, :, None] == ids, logits, 0.0), -1)
  return log_z - hit, log_z


def next_token(module: Any, batch: Mapping[str, jax.Array], *, dropout_key: Key[Array, ''] | None
               = None, z_loss: float = 0.0) -> tuple[jax.Array, jax.Array, Metrics]:
  """Cross-entropy of the next token, with an optional z-loss.

  Args:
    module: maps `inputs`, `positions`, `segment_ids` to logits [B, L, V].
    batch: `inputs`, `targets`, `positions`, `segment_ids` int32 [B, L]; `loss_weights` float32.
    dropout_key: None disables dropout.
    z_loss: weight of log(Z)^2 (PaLM, arXiv:2204.02311, section 5), which keeps logits near 0.
  Returns:
    The weighted sum of losses in nats, the sum of weights, and metrics as (sum, weight).
  """
  logits = module(batch['inputs'], positions=batch['positions'],
                  segment_ids=batch['segment_ids'], dropout_key=dropout_key)
  nll, log_z = cross_entropy(logits, batch['targets'])
  weights = batch['loss_weights'].astype(jnp.float32)
  weight, loss = jnp.sum(weights), jnp.sum(nll * weights)
  metrics: Metrics = {'loss': (loss, weight)}
  if z_loss:
    extra = z_loss * jnp.sum(jnp.square(log_z) * weights)
    metrics['z_loss'] = (extra, weight)
    loss = loss + extra
  return loss, weight, metrics
