"""The training step: a pure function of (state, batch), and how a batch reaches the mesh."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from partitioning import rules as rules_lib
from t5x_like import losses
from t5x_like.state import Structure

TrainStep = Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]]


class Loader(Protocol):
  """What a run needs of its data: `batch(step)` as arithmetic. See `t5x_like.data.loader.Loader`.

  A loader that cannot seek (a live TensorFlow pipeline) also has `state() -> bytes` and
  `restore(bytes)`, which travel with every checkpoint.
  """

  @property
  def spec(self) -> Mapping[str, tuple[tuple[int, ...], Any]]:
    """Global shape and dtype per feature."""
    ...

  @property
  def fingerprint(self) -> str:
    """Hash of everything that determines the order of the data."""
    ...

  def batch(self, step: int, rows: Any = None) -> Mapping[str, np.ndarray]:
    """The batch of a step, or the given rows of it."""
    ...


def batch_shapes(spec: Mapping[str, tuple[tuple[int, ...], Any]], structure: Structure, *,
                 microbatches: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes and shardings of a global batch.

  Args:
    spec: global shape and dtype per feature, batch first.
    structure: mesh and rules.
    microbatches: how many parts the step takes the batch in.
  Raises:
    ValueError: the batch does not divide by the mesh or by the microbatches.
  """
  out = {}
  for name, (shape, dtype) in spec.items():
    axes = ('batch', 'length')[:len(shape)]
    if shape[0] % microbatches:
      raise ValueError(f'batch of {shape[0]} rows does not divide into {microbatches} '
                       f'microbatches; change batch_size or microbatches')
    part = (shape[0] // microbatches, *shape[1:])
    where = rules_lib.sharding(structure.mesh, axes, part, structure.rules.activations,
                               name=f'batch feature {name!r}'
                                    + (' of one microbatch' if microbatches > 1 else ''))
    out[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=where)
  return out


def place(loader: Loader, step: int, shapes: Mapping[str, jax.ShapeDtypeStruct]
          ) -> dict[str, jax.Array]:
  """Reads this process's rows of a step and puts them on its devices.

  Args:
    loader: read for exactly the rows that this process's devices hold.
    step: which batch.
    shapes: from `batch_shapes`.
  Returns:
    Global arrays.
  """
  if jax.process_count() == 1:
    batch = loader.batch(step)
    _check_features(batch, shapes)
    return jax.device_put({name: batch[name] for name in shapes},
                          {name: x.sharding for name, x in shapes.items()})
  first = next(iter(shapes.values()))
  indices = first.sharding.addressable_devices_indices_map(first.shape).values()
  rows = sorted({row for index in indices if index is not None
                 for row in range(*index[0].indices(first.shape[0]))})
  batch = loader.batch(step, rows=rows)
  _check_features(batch, shapes)
  local = {row: i for i, row in enumerate(rows)}

  def pick(name: str, index: Any) -> np.ndarray:
    wanted = [local[row] for row in range(*index[0].indices(first.shape[0]))]
    return batch[name][wanted][(slice(None), *index[1:])]

  return {name: jax.make_array_from_callback(x.shape, x.sharding, lambda i, n=name: pick(n, i))
          for name, x in shapes.items()}


def _check_features(batch: Mapping[str, np.ndarray], shapes: Mapping[str, Any]) -> None:
  missing = sorted(shapes.keys() - batch.keys())
  if missing:
    raise ValueError(f'the loader gave no {missing}; it has {sorted(batch)}')


def make(structure: Structure, optimizer: optax.GradientTransformation, loss: losses.Loss, *,
         seed: int, microbatches: int = 1, ema: float | None = None) -> TrainStep:
  """Builds the train step; jit it with `compiled`.

  The gradient is that of the mean over all real tokens of the whole batch, exact for any number of
  microbatches: sums and weights are accumulated apart and divided once.

  Args:
    structure: the model's.
    optimizer: maps gradients to updates; `learning_rate(step)`, if it has one, is reported.
    loss: see `losses.Loss`.
    seed: dropout keys are fold_in(fold_in(seed, step), microbatch).
    microbatches: parts computed one after the other.
    ema: decay of the average of the parameters, or None.
  Returns:
    (state, batch) -> (state, metrics), metrics being float32 scalars.
  """
  def loss_of(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, Any]:
    total, weight, metrics = loss(structure.module(params), batch, dropout_key=key)
    return total, (weight, metrics)

  gradient = jax.grad(loss_of, has_aux=True)

  def sums(params: Any, batch: Any, key: jax.Array) -> Any:
    if microbatches == 1:
      return gradient(params, batch, jax.random.fold_in(key, 0))
    parts = jax.tree.map(lambda x: _interleave(x, microbatches), batch)
    one = lambda i, part: gradient(params, part, jax.random.fold_in(key, i))

    def add(total: Any, item: Any) -> tuple[Any, None]:
      i, part = item
      part = jax.tree.map(lambda x: rules_lib.constrain(x, *('batch', 'length')[:x.ndim]), part)
      return jax.tree.map(jnp.add, total, one(i, part)), None

    shape = jax.eval_shape(one, 0, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shape)
    index = jnp.arange(microbatches, dtype=jnp.int32)
    return jax.lax.scan(add, zeros, (index, parts))[0]

  def train_step(train_state: Any, batch: Any) -> tuple[Any, dict[str, jax.Array]]:
    step, params = train_state['step'], train_state['params']
    key = jax.random.fold_in(jax.random.key(seed), step)
    grads, (weight, metrics) = sums(params, batch, key)
    divisor = jnp.maximum(weight, 1e-9)
    grads = jax.tree.map(lambda g: g / divisor.astype(g.dtype), grads)
    updates, opt_state = optimizer.update(grads, train_state['opt_state'], params)
    params = optax.apply_updates(params, updates)
    new = {'params': params, 'opt_state': opt_state, 'step': step + 1}
    if ema is not None:
      new['ema'] = optax.incremental_update(params, train_state['ema'], 1 - ema)
    out = {name: total / jnp.maximum(w, 1e-9) for name, (total, w) in metrics.items()}
    out |= {'grad_norm': optax.tree.norm(grads), 'tokens': weight}
    rate = getattr(optimizer, 'learning_rate', None)
    if rate is not None:
      out['learning_rate'] = jnp.asarray(rate(step), jnp.float32)
    return new, out

  return train_step


@jax.jit
def param_norm(params: Any) -> jax.Array:
  """Root of the sum of squares, in float32 whatever the parameters are kept in.

  Args:
    params: tree of arrays.
  Returns:
    float32 scalar; not finite when some parameter is not.
  """
  return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(params)))


def _interleave(x: jax.Array, parts: int) -> jax.Array:
  """[B, ...] to [parts, B / parts, ...]: part i takes rows i, i + parts, ...

  so that every part is spread over the devices as the whole batch is.
  """
  return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)


def lower(train_step: TrainStep, structure: Structure, abstract_state: Any,
          shapes: Mapping[str, jax.ShapeDtypeStruct]) -> Any:
  """Lowers the step for the structure's mesh with donated state; `.compile()` the result.

  Args:
    train_step: from `make`.
    structure: mesh and rules.
    abstract_state: from `state.abstract`.
    shapes: from `batch_shapes`.
  """
  wanted = jax.tree.map(lambda x: x.sharding, abstract_state)
  replicated = NamedSharding(structure.mesh, PartitionSpec())
  with jax.set_mesh(structure.mesh), rules_lib.use(structure.rules):
    jitted = jax.jit(train_step, donate_argnums=0, out_shardings=(wanted, replicated))
    return jitted.lower(abstract_state, dict(shapes))


def memory_per_device(tree: Any) -> int:
  """Bytes one device holds of a tree of arrays or ShapeDtypeStructs with shardings."""
  def one(x: Any) -> int:
    shard = x.sharding.shard_shape(x.shape)
    return int(np.prod(shard, dtype=np.int64)) * x.dtype.itemsize
  return sum(one(x) for x in jax.tree.leaves(tree))


def evaluation_params(train_state: Mapping[str, Any]) -> Any:
  """The parameters evaluation reads: the average if the run keeps one."""
  return train_state.get('ema', train_state['params'])


