"""Losses as (sum, weight), so that a mean over real tokens is exact under any split.

Letters: B batch, L length, V vocab.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from models import moe

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
               = None, z_loss: float = 0.0, balance_loss: float = 0.0, router_z_loss: float = 0.0,
               accuracy: str = '') -> tuple[jax.Array, jax.Array, Metrics]:
  """Cross-entropy of the next token, with an optional z-loss and those of routers.

  Args:
    module: maps `inputs`, `positions`, `segment_ids` to logits [B, L, V]; for the losses of
      routers it also has `logits_and_router`, as `models.decoder.Decoder` does.
    batch: `inputs`, `targets`, `positions`, `segment_ids` int32 [B, L]; `loss_weights` float32;
      perhaps `prefix` int32, above 0 for tokens to be seen in both directions.
    dropout_key: None disables dropout.
    z_loss: weight of log(Z)^2 (PaLM, arXiv:2204.02311, section 5), which keeps logits near 0.
    balance_loss: weight of `models.moe.balance_loss`; Switch's is 0.01, Mixtral's 0.02.
    router_z_loss: weight of `models.moe.z_loss`; ST-MoE's is 0.001.
    accuracy: name of the metric of how often the likeliest token is right; '' leaves it out.
  Returns:
    The weighted sum of losses in nats, the sum of weights, and metrics as (sum, weight). Those of
    routers, `balance_loss`, `router_z_loss` and the share of `dropped` choices, are reported
    before their weight, so that they can be compared between runs.
  Raises:
    ValueError: losses of routers for a model without experts.
  """
  given = dict(positions=batch['positions'], segment_ids=batch['segment_ids'],
               dropout_key=dropout_key)
  if 'prefix' in batch:
    given['prefix'] = batch['prefix']
  routed = None
  if balance_loss or router_z_loss:
    logits, routed = _with_router(module)(batch['inputs'], **given)
  else:
    logits = module(batch['inputs'], **given)
  loss, weight, metrics = _scored(logits, batch, z_loss=z_loss, accuracy=accuracy)
  if routed is not None:
    # Means over the batch already: times the weight, they stay so when it is divided by.
    balance, router_z = moe.balance_loss(routed) * weight, moe.z_loss(routed) * weight
    loss = loss + balance_loss * balance + router_z_loss * router_z
    metrics |= {'balance_loss': (balance, weight), 'router_z_loss': (router_z, weight),
                'dropped': moe.dropped(routed)}
  return loss, weight, metrics


def _with_router(module: Any) -> Any:
  if not hasattr(module, 'logits_and_router'):
    raise ValueError(f'balance_loss and router_z_loss need a model with logits_and_router; '
                     f'{type(module).__name__} has none: set both to 0')
  return module.logits_and_router


def masked_lm(module: Any, batch: Mapping[str, jax.Array], *, dropout_key: Key[Array, ''] | None
              = None, z_loss: float = 0.0) -> tuple[jax.Array, jax.Array, Metrics]:
  """Cross-entropy of the tokens hidden from an encoder (BERT, arXiv:1810.04805).

  Args:
    module: maps `inputs`, `positions`, `segment_ids` and perhaps `types` to logits [B, L, V].
    batch: `inputs` with masks, `targets` at the same places, `positions`, `segment_ids` int32
      [B, L]; `loss_weights` float32, above 0 where a target counts; perhaps `types` int32.
    dropout_key: None disables dropout.
    z_loss: as for `next_token`.
  Returns:
    The weighted sum of losses in nats, the sum of weights, and metrics as (sum, weight), among
    them the accuracy.
  """
  types = {'types': batch['types']} if 'types' in batch else {}
  logits = module(batch['inputs'], positions=batch['positions'],
                  segment_ids=batch['segment_ids'], dropout_key=dropout_key, **types)
  return _scored(logits, batch, z_loss=z_loss, accuracy='masked_accuracy')


def sequence_to_sequence(module: Any, batch: Mapping[str, jax.Array], *,
                         dropout_key: Key[Array, ''] | None = None, z_loss: float = 0.0
                         ) -> tuple[jax.Array, jax.Array, Metrics]:
  """Cross-entropy of what a decoder writes about what its encoder read.

  Args:
    module: maps `encoder_inputs`, `inputs` and their positions and segments to logits [B, L, V].
    batch: of the encoder `encoder_inputs`, `encoder_positions`, `encoder_segment_ids` int32
      [B, S]; of the decoder what `next_token` takes.
    dropout_key: None disables dropout.
    z_loss: as for `next_token`.
  Returns:
    The weighted sum of losses in nats, the sum of weights, and metrics as (sum, weight), among
    them the accuracy.
  """
  logits = module(batch['encoder_inputs'], batch['inputs'],
                  encoder_positions=batch['encoder_positions'],
                  encoder_segment_ids=batch['encoder_segment_ids'], positions=batch['positions'],
                  segment_ids=batch['segment_ids'], dropout_key=dropout_key)
  return _scored(logits, batch, z_loss=z_loss, accuracy='accuracy')


def _scored(logits: Float[Array, 'B L V'], batch: Mapping[str, jax.Array], *, z_loss: float,
            accuracy: str = '') -> tuple[jax.Array, jax.Array, Metrics]:
  """Loss and metrics of logits; with the name of an accuracy, that too."""
  nll, log_z = cross_entropy(logits, batch['targets'])
  weights = batch['loss_weights'].astype(jnp.float32)
  weight, loss = jnp.sum(weights), jnp.sum(nll * weights)
  metrics: Metrics = {'loss': (loss, weight)}
  if accuracy:
    right = (jnp.argmax(logits, -1) == batch['targets']).astype(jnp.float32)
    metrics[accuracy] = (jnp.sum(right * weights), weight)
  if z_loss:
    extra = z_loss * jnp.sum(jnp.square(log_z) * weights)
    metrics['z_loss'] = (extra, weight)
    loss = loss + extra
  return loss, weight, metrics
