"""Weights with logical axes, norms, embeddings, MLPs and dropout.

Letters: B batch, L length, D embed, F mlp, V vocab.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from models.config import DecoderConfig
from partitioning import rules

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    'gelu': lambda x: jax.nn.gelu(x, approximate=False), 'gelu_tanh': jax.nn.gelu,
    'gelu_10': lambda x: jnp.clip(jax.nn.gelu(x, approximate=False), -10.0, 10.0),
    'quick_gelu': lambda x: x * jax.nn.sigmoid(1.702 * x), 'hardswish': jax.nn.hard_swish,
    # Mega's stand-in for a squared relu (arXiv:2209.10655, equation 13), constants as published.
    'laplace': lambda x: 0.5 * (1.0 + jax.lax.erf((x - 0.707107) / (0.282095 * 2.0**0.5))),
    'leaky_relu': jax.nn.leaky_relu, 'linear': lambda x: x, 'mish': jax.nn.mish,
    'relu': jax.nn.relu, 'relu2': lambda x: jnp.square(jax.nn.relu(x)), 'relu6': jax.nn.relu6,
    'sigmoid': jax.nn.sigmoid, 'silu': jax.nn.silu,
    'sqrtsoftplus': lambda x: jnp.sqrt(jax.nn.softplus(x)), 'tanh': jnp.tanh,
}


def param(value: jax.Array, axes: Sequence[str]) -> nnx.Param:
  """A parameter with its logical axes under our own metadata key.

  Flax's own `sharding` metadata would place values eagerly; state is born sharded by jit instead.
  """
  assert value.ndim == len(axes), (value.shape, axes)
  return nnx.Param(value, axes=tuple(axes))


def fan_in_init(rngs: nnx.Rngs, shape: Sequence[int], fan_in: int) -> jax.Array:
  """Truncated normal at two deviations with variance 1 / fan_in, float32.

  0.8796 is the deviation of a unit normal cut at two, so the result has the stated variance.
  """
  drawn = jax.random.truncated_normal(rngs.params(), -2.0, 2.0, tuple(shape), jnp.float32)
  return drawn * (fan_in**-0.5 / 0.87962566103423978)


class Dense(nnx.Module):
  """y = x @ kernel (+ bias), for kernels of any rank.

  Attributes:
    kernel: [*ins, *outs] float32.
    bias: [*outs] float32, or None.
  """

  def __init__(self, rngs: nnx.Rngs, *, ins: dict[str, int], outs: dict[str, int],
               bias: bool = False, scale: float = 1.0):
    fan_in = 1
    for size in ins.values():
      fan_in *= size
    self.ins, self.outs = tuple(ins), tuple(outs)
    self.in_shape, self.out_shape = tuple(ins.values()), tuple(outs.values())
    shape = (*self.in_shape, *self.out_shape)
    self.kernel = param(fan_in_init(rngs, shape, fan_in) * scale, (*ins, *outs))
    self.bias = param(jnp.zeros(self.out_shape, jnp.float32), self.outs) if bias else None

  def __call__(self, x: Float[Array, 'B L *ins'], out_axes: tuple[str, ...]
               ) -> Float[Array, 'B L *outs']:
    """Applies the layer.

    Args:
      x: [B, L, *ins] in the compute dtype.
      out_axes: logical axes of the result after batch and length, one entry per output dim.
    Returns:
      [B, L, *outs] in the dtype of `x`.
    """
    batch = x.shape[:2]
    kernel = rules.gathered(self.kernel[...], *self.ins, *self.outs).astype(x.dtype)
    rows, columns = _size(self.in_shape), _size(self.out_shape)
    y = rules.project(x.reshape(*batch, rows), kernel.reshape(rows, columns),
                      ('batch', 'length', out_axes[0]))
    y = y.reshape(*batch, *self.out_shape)
    if self.bias is not None:
      bias = rules.gathered(self.bias[...], *self.outs).astype(x.dtype)
      y = y + bias.reshape((1, 1) + self.out_shape)
    return rules.constrain(y, 'batch', 'length', *out_axes)


def _size(shape: Sequence[int]) -> int:
  total = 1
  for dim in shape:
    total *= dim
  return total


class Norm(nnx.Module):
  """RMSNorm (arXiv:1910.07467) or LayerNorm (arXiv:1607.06450), computed in float32.

  Attributes:
    scale: of the shape normalised over, [D] unless `dims` says otherwise.
    bias: of the same shape, or None.
  """

  def __init__(self, config: DecoderConfig, dims: dict[str, int] | None = None):
    self.kind, self.eps, self.offset = config.norm, config.norm_eps, config.norm_offset
    dims = {'norm': config.embed} if dims is None else dims
    self.shape = tuple(dims.values())
    # So that the scale in effect starts at 1.
    self.scale = param(jnp.full(self.shape, 1.0 - self.offset, jnp.float32), tuple(dims))
    biased = 'norm' in config.biases
    self.bias = param(jnp.zeros(self.shape, jnp.float32), tuple(dims)) if biased else None

  def __call__(self, x: Float[Array, 'B L *D']) -> Float[Array, 'B L *D']:
    over = tuple(range(-len(self.shape), 0))
    y = x.astype(jnp.float32)
    if self.kind == 'layernorm':
      y = y - jnp.mean(y, over, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, over, keepdims=True) + self.eps)
    scale = self.scale[...] + self.offset if self.offset else self.scale[...]
    wide = (1,) * (x.ndim - len(self.shape)) + self.shape
    y = y * scale.reshape(wide)
    if self.bias is not None:
      y = y + self.bias[...].reshape(wide)
    return y.astype(x.dtype)


class MLP(nnx.Module):
  """Plain (two matrices) or gated (three) feed-forward layer."""

  def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, *, out_scale: float = 1.0):
    self.activation = config.activation
    bias = 'mlp' in config.biases
    embed, mlp = {'embed': config.embed}, {'mlp': config.mlp}
    gated = config.mlp_form == 'gated'
    self.gate = Dense(rngs, ins=embed, outs=mlp, bias=bias) if gated else None
    self.up = Dense(rngs, ins=embed, outs=mlp, bias=bias)
    self.down = Dense(rngs, ins=mlp, outs=embed, bias=bias, scale=out_scale)

  def __call__(self, x: Float[Array, 'B L D']) -> Float[Array, 'B L D']:
    act = ACTIVATIONS[self.activation]
    up = self.up(x, ('mlp',))
    hidden = act(up) if self.gate is None else act(self.gate(x, ('mlp',))) * up
    return self.down(hidden, ('embed',))


def embed_deviation(config: DecoderConfig) -> float:
  """Deviation of the initial token table: 1, or 1/sqrt(embed) where it also gives the logits."""
  return config.embed**-0.5 if config.embeddings == 'tied' else 1.0


class Embed(nnx.Module):
  """Token table, read by gather on one device and by one-hot product where the table is split.

  The transpose of a gather is a scatter, which a partitioner turns into a full rematerialisation
  of a split table; the transpose of a product is a product.
  """

  def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
    self.shape, self.dtype = (config.vocab, config.embed), jnp.dtype(config.dtype)
    self.multiplier = config.embed_scale
    value = fan_in_init(rngs, self.shape, 1) * embed_deviation(config)
    self.embedding = param(value, ('vocab', 'embed'))

  def __call__(self, tokens: Int[Array, 'B L']) -> Float[Array, 'B L D']:
    table = rules.gathered(self.embedding[...], 'vocab', 'embed').astype(self.dtype)
    if rules.splits('vocab', 'embed', shape=self.shape):
      hot = jax.nn.one_hot(tokens, self.shape[0], dtype=self.dtype)
      x = rules.project(rules.constrain(hot, 'batch', 'length', 'vocab'), table,
                        ('batch', 'length', 'embed'))
    else:
      x = table[tokens]
    if self.multiplier != 1.0:
      x = x * jnp.asarray(self.multiplier, self.dtype)
    return rules.constrain(x, 'batch', 'length', 'embed')

  def attend(self, x: Float[Array, 'B L D']) -> Float[Array, 'B L V']:
    """Logits against the same table (tied embeddings)."""
    table = rules.gathered(self.embedding[...], 'vocab', 'embed').astype(x.dtype)
    return rules.project(x, table.T, ('batch', 'length', 'vocab'))


def dropout(x: jax.Array, rate: float, key: Key[Array, ''] | None) -> jax.Array:
  """Inverted dropout; the identity without a key or at rate 0."""
  if key is None or rate == 0.0:
    return x
  keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
  return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype)).astype(x.dtype)
