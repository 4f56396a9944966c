"""The train state: a pure dict of arrays, described before a single one exists.

A module is structure; the state at every jit boundary is a nested dict of jax.Arrays. One
`eval_shape` gives the graph definition, logical axes, shapes and shardings; parameters are then
born sharded by a jitted initialiser.
"""

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from partitioning import rules as rules_lib
from t5x_like import integrity

QUICK_INIT = 30_000_000  # parameters up to which compiling costs more than drawing


class Model(Protocol):
  """What a run needs of a model: how to build its module. See `models.decoder.DecoderLM`."""

  def build(self, rngs: nnx.Rngs) -> nnx.Module:
    """Builds the module, drawing every parameter from `rngs.params()`."""
    ...


@dataclasses.dataclass(frozen=True)
class Structure:
  """Everything known about a model before its parameters exist.

  Attributes:
    graphdef: the module without its arrays; `nnx.merge(graphdef, params)` inside traced code.
    axes: nested dict of logical axis names, shaped like the parameters.
    shapes: nested dict of ShapeDtypeStruct with shardings.
    mesh: where it lives.
    rules: how logical axes map to the mesh.
  """

  graphdef: Any
  axes: dict[str, Any]
  shapes: dict[str, Any]
  mesh: Mesh
  rules: rules_lib.Rules

  def module(self, params: dict[str, Any]) -> Any:
    """The module over `params`; call inside traced code."""
    return nnx.merge(self.graphdef, params)

  def rows(self) -> list[dict[str, Any]]:
    """One dict per parameter: path, shape, axes, spec, dtype, count, bytes."""
    axes = path_dict(self.axes, is_leaf=lambda x: isinstance(x, tuple))
    return [{'path': path, 'shape': tuple(x.shape), 'axes': axes[path], 'spec': x.sharding.spec,
             'dtype': str(x.dtype), 'count': x.size, 'bytes': x.size * x.dtype.itemsize}
            for path, x in path_dict(self.shapes).items()]


def path_dict(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
  """Flattens a nested dict into {'a/b/c': leaf}."""
  flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in flat}


def describe(model: Model, mesh: Mesh, rules: rules_lib.Rules) -> Structure:
  """Builds the model abstractly and maps every parameter to the mesh.

  Args:
    model: builds the module.
    mesh: the device mesh.
    rules: logical axes to mesh axes.
  Returns:
    The structure; nothing is allocated.
  Raises:
    ValueError: a parameter without logical axes, an axis no rule covers, or an indivisible one.
  """
  module = nnx.eval_shape(lambda: model.build(nnx.Rngs(params=0)))
  graphdef, state, rest = nnx.split(module, nnx.Param, ...)
  if jax.tree.leaves(rest):
    raise ValueError('the model holds variables that are not nnx.Param; keep other state out of '
                     'the module')
  is_variable = lambda v: isinstance(v, nnx.Variable)
  axes, shapes = {}, {}
  for path, variable in jax.tree_util.tree_leaves_with_path(state, is_leaf=is_variable):
    name = '/'.join(str(getattr(k, 'key', getattr(k, 'name', k))) for k in path)
    axes[name] = _axes_of(name, variable)
    value = variable.get_value() if hasattr(variable, 'get_value') else variable.value
    where = rules_lib.sharding(mesh, axes[name], value.shape, rules.params, name=name)
    shapes[name] = jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=where)
  return Structure(graphdef, integrity.nest(axes), integrity.nest(shapes), mesh, rules)


def _axes_of(name: str, variable: Any) -> tuple[str, ...]:
  axes = variable.get_metadata().get('axes')
  if axes is None:
    raise ValueError(f'parameter {name} has no logical axes; create it with models.layers.param')
  stacked = len(variable.shape) - len(axes)
  return ('layers',) * stacked + tuple(axes)


def like_params(tree: Any, structure: Structure) -> Any:
  """Gives optimizer leaves that mirror a parameter its sharding; everything else is replicated.

  A leaf mirrors a parameter when its path ends in the parameter's path and its shape agrees.
  Factored statistics keep the axes that remain when one dimension was reduced away.

  Args:
    tree: ShapeDtypeStructs of the optimizer state.
    structure: the parameters' shapes and axes.
  Returns:
    The same tree with shardings.
  """
  params = path_dict(structure.shapes)
  axes = path_dict(structure.axes, is_leaf=lambda x: isinstance(x, tuple))
  replicated = NamedSharding(structure.mesh, PartitionSpec())

  def place(path: Any, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    parts = jax.tree_util.keystr(path, simple=True, separator='/').split('/')
    tails = ('/'.join(parts[i:]) for i in range(len(parts)))
    name = next((tail for tail in tails if tail in params), None)
    where = replicated if name is None else _mirror(x, params[name], axes[name], structure)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where or replicated)

  return jax.tree_util.tree_map_with_path(place, tree)


def _mirror(x: Any, param: Any, axes: tuple[str, ...], structure: Structure
            ) -> NamedSharding | None:
  if x.shape == param.shape:
    return param.sharding
  for gone in range(len(axes)):
    if x.shape == param.shape[:gone] + param.shape[gone + 1:]:
      kept = list(param.sharding.spec)
      kept += [None] * (len(axes) - len(kept))
      return NamedSharding(structure.mesh, PartitionSpec(*kept[:gone], *kept[gone + 1:]))
  return None


def abstract(structure: Structure, optimizer: optax.GradientTransformation, *,
             ema: bool = False) -> dict[str, Any]:
  """The train state as ShapeDtypeStructs with shardings.

  Args:
    structure: from `describe`.
    optimizer: its `init` is evaluated abstractly.
    ema: whether the state carries an average of the parameters.
  Returns:
    {'params', 'opt_state', 'step'} and, if asked, 'ema'.
  """
  opt_state = jax.eval_shape(optimizer.init, structure.shapes)
  step = jax.ShapeDtypeStruct((), jnp.int32,
                              sharding=NamedSharding(structure.mesh, PartitionSpec()))
  state = {'params': structure.shapes, 'opt_state': like_params(opt_state, structure),
           'step': step}
  return {**state, 'ema': structure.shapes} if ema else state


def initial(model: Model, structure: Structure, optimizer: optax.GradientTransformation, *,
            seed: int, ema: bool = False) -> dict[str, Any]:
  """Draws the initial train state, every array born sharded.

  Args:
    model: builds the module.
    structure: from `describe`.
    optimizer: initialises its own state.
    seed: the draw depends on it alone, not on the mesh.
    ema: whether the state carries an average of the parameters.
  Returns:
    The state; see `abstract`.
  """
  wanted = jax.tree.map(lambda x: x.sharding, abstract(structure, optimizer, ema=ema))

  def init() -> dict[str, Any]:
    module = model.build(nnx.Rngs(params=seed))
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    state = {'params': params, 'opt_state': optimizer.init(params),
             'step': jnp.zeros((), jnp.int32)}
    return {**state, 'ema': params} if ema else state

  # LLVM takes seven times as long to optimise the random draws of a small model as they take
  # unoptimised; the values are the same.
  small = sum(x.size for x in jax.tree.leaves(structure.shapes)) < QUICK_INIT
  quick: dict[str, Any] = {}
  if jax.default_backend() == 'cpu' and small:
    quick['xla_backend_optimization_level'] = 0
  with jax.set_mesh(structure.mesh), rules_lib.use(structure.rules):
    return jax.jit(init, out_shardings=wanted).lower().compile(compiler_options=quick)()


def check_names(wanted: dict[str, Any], found: dict[str, Any], *, what: str) -> None:
  """Compares two nested dicts of shapes and refuses all differences at once.

  Args:
    wanted: what the model needs.
    found: what a file or caller offers.
    what: how to call the offer in the error.
  Raises:
    ValueError: missing, extra or misshapen entries, each with the nearest name.
  """
  want, have = path_dict(wanted), path_dict(found)
  problems = []
  for name in want.keys() - have.keys():
    near = difflib.get_close_matches(name, have.keys() - want.keys(), 1)
    problems.append(f'missing {name}' + (f' (nearest: {near[0]})' if near else ''))
  problems += [f'unknown {name}' for name in have.keys() - want.keys()]
  problems += [f'{name} has shape {tuple(have[name].shape)}, expected {tuple(want[name].shape)}'
               for name in want.keys() & have.keys() if want[name].shape != have[name].shape]
  if problems:
    raise ValueError(f'{what} does not fit the model: ' + '; '.join(sorted(problems)))
