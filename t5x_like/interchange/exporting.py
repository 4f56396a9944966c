"""A checkpoint becomes a folder in Hugging Face format, one tensor in memory at a time."""

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from models.hf import family as family_lib
from models.hf import files, table
from models.hf.settings import HARMLESS, Settings
from partitioning import mesh as mesh_lib
from partitioning import rules as rules_lib
from t5x_like import checkpoints
from t5x_like import state as state_lib
from t5x_like.data import progress
from t5x_like.interchange import arrays, folder, importing, safetensors

DType = Literal['as_imported', 'f32', 'bf16', 'f16']
Which = Literal['params', 'ema', 'evaluated']
DTYPES = {'f32': 'F32', 'bf16': 'BF16', 'f16': 'F16'}
_BLOCK = 1 << 20
_MARK = '.exporting'  # says that an unfinished folder is ours
_TORCH = {'F64': 'float64', 'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16'}
# Harmless, but about the weights that were: what is written decides them.
_OURS = {'dtype', 'torch_dtype', 'model_type', 'architectures', 'quantization_config', 'auto_map',
         'transformers_version', '_name_or_path'}


class Plan(NamedTuple):
  """An export before a tensor is read.

  Attributes:
    path: of the checkpoint.
    reader: of its arrays.
    kept: folder of the imported settings and tokenizer files, which may be absent.
    original: the imported settings, or {}.
    family: to write as.
    config: ours.
    root: which weights: 'params' or 'ema'.
    leaves: our parameters.
    places: their tensors.
    constants: tensors that hold nothing learned.
    planned: what will be written.
  """

  path: str
  reader: arrays.Reader
  kept: str
  original: dict[str, Any]
  family: family_lib.Family
  config: Any
  root: str
  leaves: dict[str, table.Leaf]
  places: list[table.Place]
  constants: Mapping[str, np.ndarray]
  planned: list[safetensors.Planned]


def export(checkpoint: str, *, out: str, model: Any = None, dtype: DType = 'as_imported',
           shard_size: str = '5GB', spelling: Literal['current', 'older'] = 'current',
           family: str | None = None, step: int | None = None, which: Which = 'evaluated') -> str:
  """Writes the folder.

  Args:
    checkpoint: directory of checkpoints, or one of them.
    out: new folder; must not exist.
    model: definition the weights belong to; None: that of the import `checkpoint` is.
    dtype: of the tensors; 'as_imported' is that of the imported files, float32 for a run of ours.
    shard_size: largest file, such as '5GB'.
    spelling: of config.json: as transformers 5 writes it, or as 4 did.
    family: name to write as; None: the imported one, else the first that can express the model.
    step: which checkpoint; None takes the newest.
    which: the trained weights, their average, or ('evaluated') the average if there is one.
  Returns:
    Path of the folder.
  Raises:
    ValueError: no such checkpoint, no family can express the model, or damage; nothing is left
      behind.
  """
  check_flags(dtype=dtype, spelling=spelling, which=which)
  limit = safetensors.size(shard_size)
  out = free(out)
  plan = prepare(checkpoint, model=model, dtype=dtype, family=family, step=step, which=which)
  chosen, planned = plan.family, plan.planned
  values = settings(chosen, plan.config, plan.original, dtype=planned[0].dtype, spelling=spelling)
  ended = folder.told(f'the export into {out}', after='run the same command again')
  with ended, _target(out) as work:
    written = safetensors.write(
        work, planned, _tensors(plan.reader, plan.root, plan.places, planned, plan.leaves,
                                plan.constants), shard_size=limit)
    plan.reader.check()
    if plan.original:
      folder.keep_files(plan.kept, work)
    with open(os.path.join(work, folder.CONFIG), 'w', encoding='utf-8') as file:
      json.dump(values, file, indent=2, sort_keys=True)
      file.write('\n')
  print(f'exported {len(planned)} tensors as {chosen.name} in {len(written)} file'
        f'{"s" * (len(written) > 1)} to {out}', file=sys.stderr)
  return out


def check_flags(**given: str) -> None:
  """Refuses a value that a flag does not have.

  Args:
    **given: dtype, spelling and which.
  Raises:
    ValueError: naming the flag and what is allowed.
  """
  allowed = {'dtype': ('as_imported', *DTYPES), 'spelling': ('current', 'older'),
             'which': ('params', 'ema', 'evaluated')}
  for name, value in given.items():
    if value not in allowed[name]:
      raise ValueError(f'{name}={value!r}; allowed: {", ".join(allowed[name])}')


def free(out: str) -> str:
  """The whole path of a folder that must not exist.

  Args:
    out: as it was given.
  Raises:
    ValueError: it exists.
  """
  out = os.path.abspath(os.path.expanduser(out))
  if os.path.exists(out):
    raise ValueError(f'{out} exists already; give a new folder, or remove it')
  return out


def prepare(checkpoint: str, *, model: Any, dtype: DType, family: str | None, step: int | None,
            which: Which) -> Plan:
  """Finds out what an export would write; arguments and errors as `export`."""
  path, reader = _open(checkpoint, step)
  kept = os.path.join(os.path.dirname(path), importing.KEPT)
  imported = reader.body['extra'].get('imported', {})
  original = folder.settings(kept).values if os.path.isdir(kept) else {}
  original.update(imported.get('settled', {}) if original else {})
  config = _config(model, kept, original)
  chosen = choose(config, family, str(imported.get('model_type', '')))
  root = _root(reader, which, path)
  made = chosen.model(config=config)
  structure = state_lib.describe(made, mesh_lib.make_mesh(devices=1), rules_lib.data_parallel())
  leaves = folder.leaves(structure)
  _check(reader, root, leaves, path)
  places = list(table.places(chosen.rows(config), leaves))
  constants = {**chosen.constants(config)}
  spare = os.path.join(kept, importing.SPARE)
  if imported.get('family') == chosen.name and os.path.isdir(spare):
    constants |= {name: stored.read() for name, stored in files.tensors(spare).items()}
  return Plan(path, reader, kept, original, chosen, config, root, leaves, places, constants,
              _plan(places, constants, dtype=dtype, imported=imported))


@contextlib.contextmanager
def _target(out: str) -> Iterator[str]:
  """A folder to write into, which becomes `out` at the end, or disappears."""
  work = f'{out}.partial'
  folder.discard(work, _MARK)
  os.makedirs(work)
  try:
    with open(os.path.join(work, _MARK), 'w', encoding='utf-8'):
      pass
    yield work
    os.rename(work, out)
    os.remove(os.path.join(out, _MARK))
  finally:
    shutil.rmtree(work, ignore_errors=True)


def able(config: Any) -> dict[str, family_lib.Family]:
  """The families that can express a configuration, by name, in the order of their names.

  What is left at None, meaning the usual, may be spelt out in what a family reads, and the reverse.
  """
  resolved = {'kv_heads': 'num_kv_heads', 'head_dim': 'width_of_head', 'out_vocab': 'head_vocab'}
  options = [(field, {None, getattr(config, field), getattr(config, meaning)})
             for field, meaning in resolved.items() if hasattr(config, meaning)]
  found = {}
  for values in itertools.product(*(values for _, values in options)):
    same = dataclasses.replace(config, **{
        field: value for (field, _), value in zip(options, values, strict=True)})
    if all(getattr(same, meaning) == getattr(config, meaning)
           for field, meaning in resolved.items() if hasattr(config, meaning)):
      found.update({family.name: family for family in family_lib.of_config(same)})
  return dict(sorted(found.items()))


def choose(config: Any, name: str | None, imported: str = '') -> family_lib.Family:
  """The family to write a configuration as.

  Args:
    config: ours.
    name: asked for; None chooses.
    imported: `model_type` it was imported with, '' if it was not.
  Raises:
    ValueError: none can express it, or not the one asked for.
  """
  found = able(config)
  listed = ', '.join(found) or 'none'
  if name is not None:
    if name not in found:
      known = family_lib.families()
      why = 'cannot express this model' if name in known else 'is no family'
      raise ValueError(f'family={name!r} {why}; those that can: {listed}')
    return found[name]
  if not found:
    raise ValueError('no family of models.hf can express this configuration without loss: '
                     f'{config}')
  for family in found.values():
    if imported in family.model_types:
      return family
  first = next(iter(found.values()))
  if len(found) > 1:
    print(f'note: written as {first.name}; also possible with --family: {listed}',
          file=sys.stderr)
  return first


def settings(family: family_lib.Family, config: Any, original: Mapping[str, Any], *, dtype: str,
             spelling: Literal['current', 'older']) -> dict[str, Any]:
  """What config.json says.

  Args:
    family: to write as.
    config: ours.
    original: the imported config.json, whose harmless fields stay; {} if there was none.
    dtype: of the tensors, by its name in the file.
    spelling: current or older.
  """
  written = family.write(config)
  if spelling == 'older':
    written = family.older(written)
  read = Settings({'model_type': original.get('model_type'), **written})
  # Model types of a family may differ in what the same settings mean.
  same = (original.get('model_type') in family.model_types
          and family_lib.structure(family.read(read)) == family_lib.structure(config))
  kind = original['model_type'] if same else family.model_types[0]
  read = Settings({'model_type': kind, **written})
  family.read(read)
  # What the family itself reads comes from the configuration alone.
  kept = {name: value for name, value in original.items()
          if name in HARMLESS - _OURS - read.read - written.keys()}
  return {**kept, **written,
          'model_type': kind,
          'architectures': (same and original.get('architectures')) or [
              family.architectures.get(kind, family.architecture)],
          'dtype' if spelling == 'current' else 'torch_dtype': _TORCH[dtype]}


def _open(checkpoint: str, step: int | None) -> tuple[str, arrays.Reader]:
  path = os.path.abspath(os.path.expanduser(checkpoint))
  if os.path.basename(path).isdigit() and step is None:
    path, step = os.path.dirname(path), int(os.path.basename(path))
  steps = checkpoints.steps(path)
  if not steps or (step is not None and step not in steps):
    raise ValueError(f'no complete checkpoint{"" if step is None else f" of step {step}"} in '
                     f'{path}; there are {steps or "none"}')
  path = os.path.join(path, str(steps[-1] if step is None else step))
  return path, arrays.Reader(path)


def _config(model: Any, kept: str, original: Mapping[str, Any]) -> Any:
  if model is not None:
    if not hasattr(model, 'config'):
      raise ValueError(f'{type(model).__name__} has no config, so no family can be found for it')
    return model.config
  if not original:
    raise ValueError(f'{kept} is not there, so the model is not known; give the configuration of '
                     f'the run that made the checkpoint: --gin_file=RUN/config.gin')
  return folder.configuration(Settings(original, kept), 'ignore')[1]


def _root(reader: arrays.Reader, which: Which, path: str) -> str:
  roots = {name.split('/')[0] for name in reader.tensors}
  wanted = {'params': ('params',), 'ema': ('ema',), 'evaluated': ('ema', 'params')}[which]
  found = next((root for root in wanted if root in roots), None)
  if found is None:
    raise ValueError(f'checkpoint {path} has no {" or ".join(wanted)}; it has '
                     f'{", ".join(sorted(roots))}')
  return found


def _check(reader: arrays.Reader, root: str, leaves: Mapping[str, table.Leaf], path: str) -> None:
  """Refuses a checkpoint of another model."""
  saved = {name.partition('/')[2]: tuple(t['shape']) for name, t in reader.tensors.items()
           if name.startswith(f'{root}/')}
  wrong = [f'missing: {name}' for name in sorted(leaves.keys() - saved.keys())]
  wrong += [f'unknown: {name}' for name in sorted(saved.keys() - leaves.keys())]
  wrong += [f'{name} is {list(saved[name])}, the model makes it {list(leaf.shape)}'
            for name, leaf in leaves.items() if saved.get(name, leaf.shape) != leaf.shape]
  if wrong:
    raise ValueError(f'checkpoint {path} does not fit this model:\n  ' + '\n  '.join(wrong))


def _plan(places: list[table.Place], constants: Mapping[str, np.ndarray], *, dtype: DType,
          imported: Mapping[str, Any]) -> list[safetensors.Planned]:
  usual = imported.get('dtype', 'F32') if dtype == 'as_imported' else DTYPES[dtype]
  others = imported.get('other_dtypes', {}) if dtype == 'as_imported' else {}
  names = {value: key for key, value in files.DTYPES.items()}
  return [*(safetensors.Planned(p.theirs, others.get(p.theirs, usual), p.shape) for p in places),
          *(safetensors.Planned(name, names[value.dtype], value.shape)
            for name, value in constants.items())]


def _tensors(reader: arrays.Reader, root: str, places: list[table.Place],
             planned: list[safetensors.Planned], leaves: Mapping[str, table.Leaf],
             constants: Mapping[str, np.ndarray]) -> Iterator[np.ndarray]:
  bar = progress.Progress('export', total=sum(one.size for one in planned))
  done, broken = 0, []
  for place, one in zip(places, planned, strict=False):
    reader.keep(f'{root}/{part.ours}' for part in place.row.parts)
    values = {part.ours: reader.read(f'{root}/{part.ours}', place.index)
              for part in place.row.parts}
    with np.errstate(over='ignore'):  # What overflows is counted as infinite.
      tensor = table.to_theirs(place, values, leaves).astype(files.DTYPES[one.dtype], copy=False)
    count = not_finite(tensor)
    if count:
      broken.append(f'{one.name}: {count} values that are NaN or infinite as {one.dtype}')
    yield tensor
    done += one.size
    bar.update(done)
  bar.close()
  if broken:
    wider = '; --dtype=bf16 or f32 has the range' if 'F16' in {p.dtype for p in planned} else ''
    raise ValueError(f'{reader.path} cannot be written as asked{wider}:\n  ' + '\n  '.join(broken))
  yield from constants.values()


def not_finite(tensor: np.ndarray) -> int:
  """How many values are NaN or infinite, found without as much memory again.

  Args:
    tensor: contiguous, of a float dtype.
  """
  flat = tensor.reshape(-1)
  return sum(int(np.count_nonzero(~np.isfinite(flat[at:at + _BLOCK])))
             for at in range(0, flat.size, _BLOCK))
