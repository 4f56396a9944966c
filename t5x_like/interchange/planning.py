"""What an import or an export would do: every parameter, and everything that is wrong, at once."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from models.hf import family as family_lib
from models.hf import files, table, tree
from models.hf.settings import Settings
from partitioning import mesh as mesh_lib
from partitioning import rules as rules_lib
from t5x_like import state as state_lib
from t5x_like import tables
from t5x_like.interchange import exporting, folder, importing, safetensors

T = TypeVar('T')


class Parameter(NamedTuple):
  """One of our parameters and where it comes from or goes.

  Attributes:
    path: ours.
    theirs: names of its tensors, layers and experts counted as in '0..11'.
    shape: ours.
    dtype: theirs to ours, or ours to theirs; '?' where a tensor is missing.
    spec: each axis with the mesh axes it is split over.
    bytes: on one device.
  """

  path: str
  theirs: str
  shape: tuple[int, ...]
  dtype: str
  spec: str
  bytes: int


class _Problems:
  """What is wrong so far."""

  def __init__(self):
    self.found: list[str] = []

  def attempt(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T | None:
    """The function's result, or None and one problem more."""
    try:
      return function(*args, **kwargs)
    except ValueError as error:
      self.found.append(str(error))
      return None

  def end(self, what: str) -> None:
    """Refuses what has problems."""
    if self.found:
      raise ValueError(f'{what} would be refused:\n' + '\n'.join(self.found))


def show_import(hf_dir: str, *, out: str, mesh: Mesh | None = None,
                rules: rules_lib.Rules | None = None, dtype: importing.DType = 'as_stored',
                unknown: folder.Unknown = 'refuse') -> list[Parameter]:
  """Prints what an import would write, from config.json and the headers of the files.

  Args:
    hf_dir, out, mesh, rules, dtype, unknown: as `importing.import_folder`.
  Returns:
    The parameters.
  Raises:
    ValueError: everything the import would be refused for.
  """
  problems = _Problems()
  problems.attempt(importing.check_flags, out=out, dtype=dtype)
  path = os.path.abspath(os.path.expanduser(hf_dir))
  read = problems.attempt(folder.settings, path)
  family = problems.attempt(family_lib.of_settings, read.values, read.where) if read else None
  stored = problems.attempt(files.tensors, path) if os.path.isdir(path) else None
  config = None
  if read and family:
    settled = family.settle(read.values, stored or {}) if stored else {}
    read = Settings({**read.values, **settled}, read.where)
    made = problems.attempt(folder.configuration, read, unknown)
    config = made[1] if made else _readable(family, read)
    problems.attempt(folder.check_readable, read)
  if not (family and config):
    problems.end('the import')
    raise AssertionError(hf_dir)
  stored = None if stored is None else folder.whole_names(family, config, stored)
  mesh = mesh_lib.make_mesh(devices=1) if mesh is None else mesh
  structure = problems.attempt(state_lib.describe, family.model(config=config), mesh,
                               rules_lib.data_parallel() if rules is None else rules)
  if structure is None:
    # So that what is wrong with the tensors is told as well.
    structure = state_lib.describe(family.model(config=config), mesh_lib.make_mesh(devices=1),
                                   rules_lib.data_parallel())
  leaves = folder.leaves(structure)
  rows = family.layout(config, stored or {})
  if stored is not None:
    problems.attempt(tree.match, family, rows, leaves, stored)
  names = {family.canonical(name): one.dtype for name, one in (stored or {}).items()}
  found = {ours: {names.get(place.theirs, '?') for place in held}
           for ours, held in _held(table.places(rows, leaves)).items()}
  wanted = {ours: _ours(kinds, dtype) for ours, kinds in found.items()}
  shown = _parameters(structure, rows, dtypes={
      ours: ('+'.join(sorted(kinds)), wanted[ours]) for ours, kinds in found.items()})
  _print(shown, f'{family.name}: {len(names)} tensors of {path}', mesh=structure.mesh, about=(
      'tokenizer and other files: ' + (', '.join(folder.others(path)) or 'none')))
  problems.end('the import')
  return shown


def show_export(checkpoint: str, *, out: str, model: Any = None,
                dtype: exporting.DType = 'as_imported', shard_size: str = '5GB',
                spelling: Literal['current', 'older'] = 'current', family: str | None = None,
                step: int | None = None, which: exporting.Which = 'evaluated') -> list[Parameter]:
  """Prints what an export would write, from the checkpoint's manifest.

  Args:
    checkpoint, out, model, dtype, shard_size, spelling, family, step, which: as
      `exporting.export`.
  Returns:
    The parameters.
  Raises:
    ValueError: everything the export would be refused for.
  """
  problems = _Problems()
  for given in ({'dtype': dtype}, {'spelling': spelling}, {'which': which}):
    problems.attempt(exporting.check_flags, **given)
  flags = not problems.found
  limit = problems.attempt(safetensors.size, shard_size)
  problems.attempt(exporting.free, out)
  plan = problems.attempt(exporting.prepare, checkpoint, model=model, dtype=dtype, family=family,
                          step=step, which=which) if flags else None
  if plan is None:
    problems.end('the export')
    raise AssertionError(checkpoint)
  problems.attempt(exporting.settings, plan.family, plan.config, plan.original,
                   dtype=plan.planned[0].dtype, spelling=spelling)
  kinds = {one.name: one.dtype for one in plan.planned}
  held = {ours: '+'.join(sorted({kinds[place.theirs] for place in places}))
          for ours, places in _held(plan.places).items()}
  structure = state_lib.describe(plan.family.model(config=plan.config),
                                 mesh_lib.make_mesh(devices=1), rules_lib.data_parallel())
  shown = _parameters(structure, plan.family.rows(plan.config), dtypes={
      ours: (plan.reader.tensors[f'{plan.root}/{ours}']['dtype'], theirs)
      for ours, theirs in held.items()})
  sizes = [one.size for one in plan.planned]
  count = len(safetensors.shards(plan.planned, limit)) if limit else 0
  others = folder.others(plan.kept) if plan.original else []
  _print(shown, f'{plan.family.name}: {plan.root} of {plan.path}', mesh=None, about=(
      f'{len(sizes)} tensors, {sum(sizes) / 1e6:,.1f} MB, in {count} file{"s" * (count != 1)}; '
      f'tokenizer and other files: ' + (', '.join(others) or 'none')))
  problems.end('the export')
  return shown


def _readable(family: family_lib.Family, read: Settings) -> Any:
  """Our configuration of settings with others nobody reads; None where they cannot be read."""
  try:
    return family.read(read)
  except ValueError:
    return None


def _held(places: Iterable[table.Place]) -> dict[str, list[table.Place]]:
  """The tensors of each of our parameters."""
  held: dict[str, list[table.Place]] = {}
  for place in places:
    for part in place.row.parts:
      held.setdefault(part.ours, []).append(place)
  return held


def _ours(kinds: set[str], dtype: str) -> str:
  known = kinds & set(importing.DTYPES)
  if dtype != 'as_stored' or not known:
    return 'float32' if dtype == 'as_stored' else dtype
  return importing.DTYPES[known.pop()] if len(known) == 1 else 'float32'


def _parameters(structure: state_lib.Structure, rows: Sequence[table.Row], *,
                dtypes: Mapping[str, tuple[str, str]]) -> list[Parameter]:
  theirs: dict[str, list[str]] = {}
  leaves = folder.leaves(structure)
  for row in rows:
    for part in row.parts:
      sizes = dict(zip(leaves[part.ours].axes, leaves[part.ours].shape, strict=True))
      count = lambda axis, first=0, sizes=sizes: f'{first}..{first + sizes.get(axis, 1) - 1}'
      theirs.setdefault(part.ours, []).append(row.theirs.format(
          layer=count(table.STACKED, row.first), expert=count(table.EXPERTS)))
  shapes = state_lib.path_dict(structure.shapes)
  out = []
  for row in structure.rows():
    ours, spec = row['path'], [*row['spec'], *[None] * len(row['shape'])]
    over = lambda split: split if isinstance(split, str) else '+'.join(split)
    axes = [axis if split is None else f'{axis}={over(split)}'
            for axis, split in zip(row['axes'], spec, strict=False)]
    part = shapes[ours].sharding.shard_shape(shapes[ours].shape)
    found = dtypes[ours]
    # Of several dtypes in their files, ours is the widest.
    written = found[1] if found[1] in importing.DTYPES.values() else importing.DTYPES.get(
        found[1], found[0])
    out.append(Parameter(
        ours, ', '.join(theirs[ours]), row['shape'], ' > '.join(found), ' '.join(axes),
        int(np.prod(part, dtype=np.int64)) * jnp.dtype(written).itemsize))
  return out


def _print(shown: Sequence[Parameter], what: str, *, mesh: Mesh | None, about: str) -> None:
  print(what)
  print(tables.text_table(
      ('theirs', 'ours', 'shape', 'dtype', 'axes', 'bytes'),
      [(one.theirs, one.path, 'x'.join(map(str, one.shape)), one.dtype, one.spec,
        f'{one.bytes:,}') for one in shown], align='lllllr'))
  where = '' if mesh is None else f' per device of mesh {dict(mesh.shape)}'
  print(f'{len(shown)} parameters, {sum(one.bytes for one in shown):,} bytes{where}')
  print(about)
