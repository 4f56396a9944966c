"""Logical axes and the ordered rules that map them to mesh axes.

Every parameter dimension carries a logical name. A rule list maps names to mesh axes, in order:
the first rule for a name whose mesh axes are still free (and, where a later rule for the same name
allows a fallback, divide the dimension) wins. A name no rule mentions is refused.
"""

import contextlib
import contextvars
import dataclasses
import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MeshAxes = str | tuple[str, ...] | None
RuleList = tuple[tuple[str, MeshAxes], ...]

VOCABULARY = {
    'layers': 'stacked layers', 'vocab': 'vocabulary entries', 'embed': 'residual stream',
    'heads': 'query heads', 'kv_heads': 'key and value heads', 'head_dim': 'width of a head',
    'mlp': 'hidden width of the MLP', 'position': 'learned positions', 'norm': 'norm scales',
    'experts': 'MLPs of a mixture of experts', 'types': 'token types',
    'buckets': 'buckets of distances', 'batch': 'rows of a batch', 'length': 'tokens of a row',
}


@dataclasses.dataclass(frozen=True)
class Rules:
  """Ordered rules for parameters and for activations.

  Attributes:
    params: (logical axis, mesh axes or None) pairs for parameters and optimizer state.
    activations: the same for activations and batches.
    replication_limit: bytes of one fully replicated parameter above which it is reported when
      the mesh could have split parameters.
  """

  params: RuleList
  activations: RuleList
  replication_limit: int = 64 * 2**20


def _rules(params: dict[str, Sequence[MeshAxes]], activations: dict[str, Sequence[MeshAxes]]
           ) -> Rules:
  flat = lambda table: tuple((name, axes) for name, choices in table.items() for axes in choices)
  replicated = {name: (None,) for name in VOCABULARY}
  return Rules(flat({**replicated, **params}), flat({**replicated, **activations}))


def data_parallel() -> Rules:
  """Batch split over every mesh axis, parameters replicated."""
  return _rules({}, {'batch': (('data', 'fsdp', 'tensor'), ('data', 'fsdp'))})


def fsdp() -> Rules:
  """ZeRO-3: parameters and optimizer state split over 'fsdp' along the residual stream."""
  return _rules({'embed': ('fsdp',)},
                {'batch': (('data', 'fsdp', 'tensor'), ('data', 'fsdp'))})


def tensor() -> Rules:
  """Megatron: heads, mlp and vocabulary split over 'tensor'; batch over 'data' and 'fsdp'."""
  split = {'vocab': ('tensor',), 'heads': ('tensor',), 'kv_heads': ('tensor', None),
           'mlp': ('tensor',)}
  return _rules(split, {**split, 'batch': (('data', 'fsdp'),)})


def fsdp_tensor() -> Rules:
  """The default: fsdp along the residual stream, tensor along heads, mlp and vocabulary."""
  split = {'vocab': ('tensor',), 'heads': ('tensor',), 'kv_heads': ('tensor', None),
           'mlp': ('tensor',)}
  return _rules({**split, 'embed': ('fsdp',)}, {**split, 'batch': (('data', 'fsdp'),)})


def custom(*, params: Sequence[Sequence[Any]], activations: Sequence[Sequence[Any]],
           base: Rules | None = None) -> Rules:
  """A rule list written in gin: its rules are tried before those of `base` (default: the preset
  `fsdp_tensor`).

  Args:
    params: (logical axis, mesh axis, tuple of them or None) pairs.
    activations: the same for activations.
    base: preset to fall back on.
  """
  base = base or fsdp_tensor()
  pairs = lambda rows: tuple((str(n), tuple(a) if isinstance(a, list) else a) for n, a in rows)
  return Rules(pairs(params) + base.params, pairs(activations) + base.activations,
               base.replication_limit)


def _as_tuple(axes: MeshAxes) -> tuple[str, ...]:
  return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def spec(axes: Sequence[str], shape: Sequence[int], rules: RuleList, mesh: Any, *,
         name: str = 'array', fit: bool = False) -> PartitionSpec:
  """Maps logical axes to mesh axes by ordered rules with fallback.

  Args:
    axes: one logical name per dimension.
    shape: the array's global shape.
    rules: ordered (logical name, mesh axes) pairs.
    mesh: a Mesh or AbstractMesh: its axis names and sizes are read.
    name: how to call the array in an error.
    fit: leave a dimension unsplit when no rule divides it, instead of refusing (activations).
  Returns:
    The partition spec; dimensions without a mesh axis are None.
  Raises:
    ValueError: a logical axis no rule mentions, a mesh axis that does not exist, or a dimension
      that the mesh axis does not divide.
  """
  if len(axes) != len(shape):
    raise ValueError(f'{name}: {len(axes)} logical axes {tuple(axes)} for shape {tuple(shape)}')
  sizes = dict(mesh.shape)
  known = {rule_name for rule_name, _ in rules}
  chosen: list[MeshAxes] = [None] * len(axes)
  used: set[str] = set()
  for dim, axis in enumerate(axes):
    if axis not in known:
      near = difflib.get_close_matches(axis, known, 1)
      raise ValueError(
          f'{name}: no sharding rule for logical axis {axis!r} (dimension {dim} of '
          f'{tuple(shape)}){f"; did you mean {near[0]!r}?" if near else ""}; add a rule '
          f'({axis!r}, mesh axis or None)')
  done: set[int] = set()
  refused: dict[int, str] = {}
  for rule_name, mesh_axes in rules:
    wanted = _as_tuple(mesh_axes)
    missing = [a for a in wanted if a not in sizes]
    if missing:
      raise ValueError(f'rule ({rule_name!r}, {mesh_axes!r}) names mesh axis {missing[0]!r}, but '
                       f'the mesh has {tuple(sizes)}')
    for dim, axis in enumerate(axes):
      if axis != rule_name or dim in done or used & set(wanted):
        continue
      ways = math.prod(sizes[a] for a in wanted)
      if shape[dim] % ways:
        refused[dim] = (f'{name}: dimension {dim} ({axis!r}, size {shape[dim]}) is not divisible '
                        f'by mesh axis {mesh_axes!r} (size {ways})')
        continue
      chosen[dim] = mesh_axes
      used |= set(wanted)
      done.add(dim)
  failed = [text for dim, text in refused.items() if dim not in done]
  if failed and not fit:
    raise ValueError(f'{failed[0]}; change the size or the mesh, or allow a fallback with a later '
                     f'rule that maps the axis to None')
  return PartitionSpec(*chosen)


_ACTIVE: contextvars.ContextVar[Rules | None] = contextvars.ContextVar('rules', default=None)


@contextlib.contextmanager
def use(rules: Rules) -> Iterator[None]:
  """Makes `rules` the ones that `constrain`, `gathered` and `project` read while tracing."""
  token = _ACTIVE.set(rules)
  try:
    yield
  finally:
    _ACTIVE.reset(token)


def _active() -> tuple[Rules, Any] | None:
  rules, mesh = _ACTIVE.get(), jax.sharding.get_abstract_mesh()
  return None if rules is None or mesh.empty else (rules, mesh)


def constrain(x: jax.Array, *axes: str) -> jax.Array:
  """Pins an activation's layout by its logical axes; the identity without a mesh.

  Args:
    x: array with one logical axis per dimension in `axes`.
  Returns:
    `x`, constrained (auto mesh) or resharded (explicit mesh).
  """
  active = _active()
  if active is None:
    return x
  rules, mesh = active
  wanted = spec(axes, x.shape, rules.activations, mesh, name='activation', fit=True)
  if mesh.are_all_axes_explicit:
    return jax.sharding.reshard(x, wanted)
  return jax.lax.with_sharding_constraint(x, wanted)


def gathered(w: jax.Array, *axes: str) -> jax.Array:
  """Shows FSDP's all-gather to an explicit mesh: keeps tensor sharding only.

  The auto partitioner inserts the gather by itself, so there this is the identity.
  """
  active = _active()
  if active is None or not active[1].are_all_axes_explicit:
    return w
  rules, mesh = active
  batch_axes = {a for name, axes_ in rules.activations if name == 'batch' for a in _as_tuple(axes_)}
  stored = spec(axes, w.shape, rules.params, mesh, name='weight', fit=True)
  kept = (tuple(a for a in _as_tuple(entry) if a not in batch_axes) for entry in stored)
  return jax.sharding.reshard(w, PartitionSpec(*(entry or None for entry in kept)))


def splits(*axes: str, shape: Sequence[int]) -> bool:
  """Whether the active rules split a parameter with these logical axes over several devices."""
  active = _active()
  if active is None:
    return False
  rules, mesh = active
  found = spec(axes, shape, rules.params, mesh, fit=True)
  return any(mesh.shape[a] > 1 for entry in found for a in _as_tuple(entry))


def project(x: jax.Array, w: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """Matrix product `x @ w` over the last axis, flattened to [tokens, dim] where layout allows.

  Flattened, the weight gradient has a single contracting dimension, which XLA's CPU backend runs
  about twice as fast as the two-dimensional contraction of a [batch, length, dim] einsum.

  Args:
    x: [..., in].
    w: [in, out].
    axes: logical axes of the result, which an explicit mesh must be told.
  Returns:
    [..., out] in the dtype of `x`.
  """
  active = _active()
  if active is not None and active[1].are_all_axes_explicit:
    rules, mesh = active
    shape = (*x.shape[:-1], w.shape[-1])
    out = spec(axes, shape, rules.activations, mesh, name='activation', fit=True)
    return jax.numpy.einsum('...d,df->...f', x, w, out_sharding=out)
  if active is not None and x.ndim > 2 and _length_is_split(*active):
    return jax.numpy.einsum('...d,df->...f', x, w)
  dot = _wide_dot if w.shape[-1] >= _WIDE else jax.lax.dot
  flat = dot(x.reshape(-1, x.shape[-1]), w)
  return flat.reshape(*x.shape[:-1], w.shape[-1])


# XLA's CPU backend of jax 0.10 multiplies a transposed left side with a wide right side at half the
# speed of the same product with the transpose written out (49 against 26 ms for 1024 tokens, 256
# dims, 8192 columns); that of jax 0.12 takes both alike.
_WIDE = 4096


@jax.custom_vjp
def _wide_dot(x: jax.Array, w: jax.Array) -> jax.Array:
  return jax.lax.dot(x, w)


def _wide_dot_forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, Any]:
  return jax.lax.dot(x, w), (x, w)


def _wide_dot_backward(kept: Any, g: jax.Array) -> tuple[jax.Array, jax.Array]:
  x, w = kept
  dw = jax.lax.platform_dependent(
      x, g, cpu=lambda x, g: jax.lax.dot(jax.lax.optimization_barrier(x.T), g),
      default=lambda x, g: jax.lax.dot(x.T, g))
  return jax.lax.dot(g, w.T), dw


_wide_dot.defvjp(_wide_dot_forward, _wide_dot_backward)


def _length_is_split(rules: Rules, mesh: Any) -> bool:
  return any(mesh.shape[a] > 1 for name, axes in rules.activations if name == 'length'
             for a in _as_tuple(axes))


def sharding(mesh: Mesh, axes: Sequence[str], shape: Sequence[int], rules: RuleList, *,
             name: str) -> NamedSharding:
  """The NamedSharding of one array; see `spec`."""
  return NamedSharding(mesh, spec(axes, shape, rules, mesh, name=name))


def replicated_report(named: dict[str, tuple[int, PartitionSpec]], rules: Rules, mesh: Mesh
                      ) -> list[str]:
  """Names parameters above `rules.replication_limit` bytes that no mesh axis splits.

  Args:
    named: bytes and spec per parameter path.
    rules: holds the limit.
    mesh: only a mesh whose 'fsdp' or 'tensor' axis has more than one device is reported on.
  Returns:
    One line per replicated parameter, largest first; empty when there is nothing to split over.
  """
  ways = mesh.shape.get('fsdp', 1) * mesh.shape.get('tensor', 1)
  if ways == 1:
    return []
  whole = [(size, name) for name, (size, found) in named.items() if size > rules.replication_limit
           and all(mesh.shape[a] == 1 for entry in found for a in _as_tuple(entry))]
  return [f'{name}: {size / 2**20:.0f} MiB replicated on {mesh.size} devices'
          for size, name in sorted(whole, reverse=True)]


def per_shard(fn: Callable[..., jax.Array], arrays: Sequence[jax.Array | None], *,
              ins: Sequence[tuple[str, ...]], out: tuple[str, ...]) -> jax.Array:
  """Runs `fn` on each device's shard of the arrays (for kernels a partitioner cannot split).

  Args:
    fn: maps the arrays to one array; every dimension it reduces over must not be split.
    arrays: arrays, or None passed through.
    ins: logical axes of each array.
    out: logical axes of the result, whose split equals that of the first array.
  Returns:
    The result; without a mesh, `fn` is simply called.
  """
  active = _active()
  if active is None:
    return fn(*arrays)
  rules, mesh = active
  layout = lambda axes, x: spec(axes, x.shape, rules.activations, mesh, fit=True)
  present = [(axes, x) for axes, x in zip(ins, arrays, strict=True) if x is not None]
  specs = tuple(layout(axes, x) for axes, x in present)

  def call(*shards: jax.Array) -> jax.Array:
    rest = iter(shards)
    return fn(*(None if x is None else next(rest) for x in arrays))

  return jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=layout(out, arrays[0]),
                       check_vma=False)(*(x for _, x in present))


def per_device(fn: Callable[..., tuple[jax.Array, ...]], arrays: Sequence[jax.Array | None], *,
               ins: Sequence[tuple[str, ...]], outs: Sequence[tuple[str, ...]], summed: str
               ) -> tuple[jax.Array, ...]:
  """Runs `fn` on each device's rows and its part of one dimension that `fn` reduces over.

  Every other dimension is whole on every device: rows may be sorted or grouped as they come.

  Args:
    fn: called with `add_up`, which adds a partial result up over the parts of `summed`, and the
      arrays.
    arrays: arrays, or None passed through.
    ins: logical axes of each array.
    outs: logical axes of each result; those of the batch are split as the batch is.
    summed: logical axis of the dimension reduced over.
  Returns:
    What `fn` returns; without a mesh, `fn` is simply called.
  """
  active = _active()
  if active is None:
    return fn(lambda x: x, *arrays)
  rules, mesh = active
  sizes = {name: size for axes, x in zip(ins, arrays, strict=True) if x is not None
           for name, size in zip(axes, x.shape, strict=True)}
  way = lambda name: spec((name,), (sizes[name],), rules.activations, mesh, fit=True)[0]
  rows, parts = way('batch'), way(summed)
  if set(_as_tuple(rows)) & set(_as_tuple(parts)):
    parts = None
  layout = lambda axes: PartitionSpec(*({'batch': rows, summed: parts}.get(a) for a in axes))
  present = [(layout(axes), x) for axes, x in zip(ins, arrays, strict=True) if x is not None]
  given = [x if not mesh.are_all_axes_explicit else jax.sharding.reshard(x, where)
           for where, x in present]

  def call(*shards: jax.Array) -> tuple[jax.Array, ...]:
    rest = iter(shards)
    return fn(lambda x: x if parts is None else jax.lax.psum(x, parts),
              *(None if x is None else next(rest) for x in arrays))

  return jax.shard_map(call, mesh=mesh, in_specs=tuple(where for where, _ in present),
                       out_specs=tuple(map(layout, outs)), check_vma=False)(*given)
