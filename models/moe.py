"""Mixtures of experts: a router sends each token to a few of many MLPs.

Letters: B batch, L length, D embed, F mlp, E experts, K experts per token, C places of an expert
in a row, T tokens of a device, N layers.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from models import grouped, layers
from models.config import DecoderConfig
from partitioning import rules


class Routed(NamedTuple):
  """What a router decided; of several layers, stacked on a leading axis.

  Attributes:
    logits: float32 score of each expert.
    chosen: the experts of each token, best first.
    kept: whether the token had a place with that expert; False for padding.
    real: whether the token is one.
  """

  logits: Float[Array, '*N B L E']
  chosen: Int[Array, '*N B L K']
  kept: Bool[Array, '*N B L K']
  real: Bool[Array, '*N B L']


class Kernels(nnx.Module):
  """A kernel, and perhaps a bias, per expert."""

  def __init__(self, rngs: nnx.Rngs, experts: int, *, ins: dict[str, int], outs: dict[str, int],
               bias: bool = False, scale: float = 1.0):
    [rows], [columns] = ins.values(), outs.values()
    drawn = layers.fan_in_init(rngs, (experts, rows, columns), rows) * scale
    self.kernel = layers.param(drawn, ('experts', *ins, *outs))
    self.bias = layers.param(jnp.zeros((experts, columns), jnp.float32), ('experts', *outs)
                             ) if bias else None


class Experts(nnx.Module):
  """The MLPs of a block: each token goes to `experts_per_token` of them, their outputs are added.

  Without a capacity every token reaches all its experts (dropless). With one, an expert takes so
  many tokens of each row (GShard, arXiv:2006.16668): first choices before second ones, early
  tokens before late ones; what finds no place leaves the residual stream as it is.
  """

  def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, *, out_scale: float = 1.0):
    experts = config.experts
    assert experts is not None
    self.config = config
    bias, gated = 'mlp' in config.biases, config.mlp_form == 'gated'
    embed, mlp = {'embed': config.embed}, {'mlp': config.mlp}
    make = lambda ins, outs, scale=1.0: Kernels(rngs, experts, ins=ins, outs=outs, bias=bias,
                                                scale=scale)
    self.router = layers.Dense(rngs, ins=embed, outs={'experts': experts})
    self.gate = make(embed, mlp) if gated else None
    self.up = make(embed, mlp)
    self.down = make(mlp, embed, out_scale)

  def __call__(self, x: Float[Array, 'B L D'], real: Bool[Array, 'B L'] | None
               ) -> tuple[Float[Array, 'B L D'], Routed]:
    """Applies the experts.

    Args:
      x: normalised residual stream.
      real: which tokens are no padding; None: all.
    Returns:
      The sum of each token's experts, weighted, and what the router decided.
    """
    if real is None:
      real = jnp.ones(x.shape[:2], bool)
    into, out = ('experts', 'embed', 'mlp'), ('experts', 'mlp', 'embed')
    given = [(x, ('batch', 'length', 'embed')), (real, ('batch', 'length')),
             (self.router.kernel[...], ('embed', 'experts'))]
    for made, axes in ((self.gate, into), (self.up, into), (self.down, out)):
      for value, names in ((None, ()), (None, ())) if made is None else (
          (made.kernel, axes), (made.bias, axes[::2])):
        given.append((None if value is None else value[...].astype(x.dtype), names))
    arrays, ins = zip(*given, strict=True)
    routed = ('batch', 'length', 'experts')
    y, logits, chosen, kept = rules.per_device(self._apply, arrays, ins=ins, summed='mlp', outs=(
        ('batch', 'length', 'embed'), routed, routed, routed))
    return rules.constrain(y, 'batch', 'length', 'embed'), Routed(logits, chosen, kept, real)

  def _apply(self, add_up: Callable[[jax.Array], jax.Array], x, real, router, *weights):
    """All on one device: its rows, and its part of every expert's hidden width."""
    config = self.config
    logits = jnp.einsum('bld,de->ble', x.astype(jnp.float32), router, precision='highest')
    shares, chosen = choose(config, logits)
    run = _Run(config, weights)
    if config.expert_capacity is None:
      kept = jnp.broadcast_to(real[:, :, None], chosen.shape)
      y = run.dropless(x, shares.astype(x.dtype), chosen)
    else:
      places, kept = assign(config, chosen, real)
      y = run.with_places(x, shares.astype(x.dtype), places)
      shares = jnp.where(kept, shares, 0.0)
    y = add_up(y)
    if run.down_bias is not None:
      hot = jax.nn.one_hot(chosen, router.shape[1], dtype=x.dtype)
      y = y + jnp.einsum('blk,blke,ed->bld', shares.astype(x.dtype), hot, run.down_bias)
    return y, logits, chosen, kept


class _Run:
  """The experts' products over the tokens of one device."""

  def __init__(self, config: DecoderConfig, weights: tuple[jax.Array | None, ...]):
    self.gate, self.gate_bias, self.up, self.up_bias, self.down, self.down_bias = weights
    self.act = layers.ACTIVATIONS[config.activation]

  def _hidden(self, product: Callable[[jax.Array], jax.Array],
              spread: Callable[[jax.Array], jax.Array]) -> jax.Array:
    def one(w: jax.Array, bias: jax.Array | None) -> jax.Array:
      return product(w) if bias is None else product(w) + spread(bias)

    assert self.up is not None
    up = one(self.up, self.up_bias)
    return self.act(up) if self.gate is None else self.act(one(self.gate, self.gate_bias)) * up

  def dropless(self, x, shares, chosen) -> Float[Array, 'B L D']:
    """Sorts tokens by expert, multiplies each group with its expert's matrices, sorts back."""
    assert self.up is not None and self.down is not None
    (batch, length, width), each = x.shape, chosen.shape[-1]
    expert = chosen.reshape(-1)
    order = jnp.argsort(expert)
    sizes = jnp.bincount(expert, length=self.up.shape[0]).astype(jnp.int32)
    rows = x.reshape(-1, width)[order // each]
    hidden = self._hidden(lambda w: grouped.product(rows, w, sizes),
                          lambda bias: bias[expert[order]])
    out = grouped.product(hidden, self.down, sizes)
    out = out.at[jnp.argsort(order)].get(unique_indices=True)
    return jnp.einsum('blkd,blk->bld', out.reshape(batch, length, each, width), shares)

  def with_places(self, x, shares, places: Bool[Array, 'B L K E C']) -> Float[Array, 'B L D']:
    """Dispatches by one-hot products, so that every shape is known while tracing."""
    assert self.down is not None
    places = places.astype(x.dtype)
    sent = jnp.einsum('blkec,bld->ebcd', places, x)
    hidden = self._hidden(lambda w: jnp.einsum('ebcd,edf->ebcf', sent, w),
                          lambda bias: bias[:, None, None, :])
    out = jnp.einsum('ebcf,efd->ebcd', hidden, self.down)
    back = jnp.einsum('blkec,blk->blec', places, shares)
    return jnp.einsum('blec,ebcd->bld', back, out)


def choose(config: DecoderConfig, logits: Float[Array, 'B L E']
           ) -> tuple[Float[Array, 'B L K'], Int[Array, 'B L K']]:
  """The best experts of each token and how much each counts.

  Args:
    config: experts per token, and over what their weights are a softmax.
    logits: float32.
  Returns:
    float32 weights, and experts, best first.
  """
  shares, chosen = jax.lax.top_k(jax.nn.softmax(logits, -1), config.experts_per_token)
  if config.router_weights == 'renormalised':
    shares = shares / jnp.sum(shares, -1, keepdims=True)
  return shares, chosen


def capacity(config: DecoderConfig, length: int) -> int:
  """Places of an expert in a row of `length` tokens."""
  assert config.experts is not None and config.expert_capacity is not None
  even = length * config.experts_per_token / config.experts
  return min(length, max(1, math.ceil(config.expert_capacity * even)))


def assign(config: DecoderConfig, chosen: Int[Array, 'B L K'], real: Bool[Array, 'B L']
           ) -> tuple[Bool[Array, 'B L K E C'], Bool[Array, 'B L K']]:
  """Gives tokens their places with experts of limited capacity.

  Args:
    config: experts and capacity.
    chosen: experts of each token.
    real: padding takes no place.
  Returns:
    Which place each token has with each expert, and whether it has one.
  """
  batch, length, each = chosen.shape
  places, experts = capacity(config, length), config.experts
  assert experts is not None
  wanted = jax.nn.one_hot(chosen, experts, dtype=jnp.int32) * real[:, :, None, None]
  # All first choices in the order of the row, then all second ones.
  queue = wanted.swapaxes(1, 2).reshape(batch, each * length, experts)
  before = (jnp.cumsum(queue, 1) - queue).reshape(batch, each, length, experts).swapaxes(1, 2)
  place = jnp.where(wanted > 0, before, places)
  hot = place[..., None] == jnp.arange(places)[None, None, None, None]
  return hot, jnp.any(hot, (-1, -2))


def balance_loss(routed: Routed) -> Float[Array, '']:
  """How unevenly tokens fall on experts: experts x sum of share of choices x mean probability.

  Switch's loss (arXiv:2101.03961, equation 4) over all layers together and all choices of a token,
  as Mixtral has it; padding does not count.

  Args:
    routed: of all layers.
  Returns:
    experts_per_token where choices are even, more where they are not.
  """
  count = routed.logits.shape[-1]
  real = routed.real.astype(jnp.float32)
  tokens = jnp.maximum(jnp.sum(real), 1.0)
  over = tuple(range(real.ndim))
  hot = jnp.sum(jax.nn.one_hot(routed.chosen, count, dtype=jnp.float32), -2)
  share = jnp.sum(hot * real[..., None], over) / tokens
  mean = jnp.sum(jax.nn.softmax(routed.logits, -1) * real[..., None], over) / tokens
  return count * jnp.sum(share * mean)


def z_loss(routed: Routed) -> Float[Array, '']:
  """Mean of log(Z)^2 of the routers (ST-MoE, arXiv:2202.08906, equation 5), padding apart."""
  real = routed.real.astype(jnp.float32)
  squares = jnp.square(jax.nn.logsumexp(routed.logits, -1))
  return jnp.sum(squares * real) / jnp.maximum(jnp.sum(real), 1.0)


def dropped(routed: Routed) -> tuple[Float[Array, ''], Float[Array, '']]:
  """Choices of real tokens that found no place, and all of them, as (sum, weight)."""
  wanted = jnp.broadcast_to(routed.real[..., None], routed.kept.shape)
  missed = jnp.sum(wanted & ~routed.kept, dtype=jnp.float32)
  return missed, jnp.sum(wanted, dtype=jnp.float32)
