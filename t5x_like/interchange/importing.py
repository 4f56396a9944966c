"""A folder in Hugging Face format becomes a checkpoint, one tensor in memory at a time.

Everything is written beside the target, with a journal of finished tensors; the target appears by
one rename. The checkpoint is step 0 of `<out>`, as a run's is step N of its directory.
"""

import json
import os
import sys
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from models.hf import table, tree
from partitioning import mesh as mesh_lib
from partitioning import rules as rules_lib
from t5x_like import integrity
from t5x_like import state as state_lib
from t5x_like.data import progress
from t5x_like.interchange import arrays, folder, modelfile, safetensors

DType = Literal['as_stored', 'float32', 'bfloat16', 'float16']
KEPT = 'hf'  # folder of the settings and tokenizer files an export needs
SPARE = 'spare'  # in it, tensors of the file that nothing is computed with
MODEL_FILE = 'model.gin'
_JOURNAL, _ARRAYS, _STEP = 'journal.jsonl', 'arrays', '0'
# What the dtypes of files become.
DTYPES = {'F64': 'float32', 'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16'}


class NotFinite(ValueError):
  """A tensor that holds NaN or infinity."""


def import_folder(hf_dir: str, *, out: str, mesh: Mesh | None = None,
                  rules: rules_lib.Rules | None = None, dtype: DType = 'as_stored',
                  unknown: folder.Unknown = 'refuse') -> str:
  """Writes the checkpoint.

  Args:
    hf_dir: holds config.json and .safetensors files.
    out: new directory of checkpoints; must not exist.
    mesh: the mesh it will be used on; None: any. Chunks then follow its shards.
    rules: logical axes to mesh axes, with a mesh.
    dtype: of the checkpoint; 'as_stored' keeps the files'.
    unknown: what happens to settings nobody reads; see `folder.configuration`.
  Returns:
    Path of the checkpoint directory.
  Raises:
    ValueError: what is wrong with the folder, all at once; nothing is left behind.
  """
  out = check_flags(out=out, dtype=dtype)
  if jax.process_count() > 1:
    raise ValueError(f'an import is the work of one process, but there are {jax.process_count()}; '
                     f'run it on one machine: its result restores onto any mesh')
  found = folder.load(hf_dir, unknown)
  mesh = mesh_lib.make_mesh(devices=1) if mesh is None else mesh
  structure = state_lib.describe(found.family.model(config=found.config), mesh,
                                 rules_lib.data_parallel() if rules is None else rules)
  leaves = folder.leaves(structure)
  rows = found.family.layout(found.config, found.stored)
  pairs = tree.match(found.family, rows, leaves, found.stored)
  job = _Job(out, found, leaves, pairs, structure=structure, dtype=dtype)
  on = 'run the same command again, which goes on where this one ended'
  try:
    with folder.told(f'the import into {out}', after=on):
      job.write()
      job.finish()
  except NotFinite:
    folder.discard(job.work, _JOURNAL)
    raise
  total = sum(found.stored[name].size for _, name in pairs)
  print(f'imported {len(pairs)} tensors, {total / 1e6:,.1f} MB, of a {found.family.name} into '
        f'{out}', file=sys.stderr)
  return out


def check_flags(*, out: str, dtype: str) -> str:
  """Refuses a dtype that is none, and a place that cannot be written to.

  Args:
    out: directory of checkpoints to make.
    dtype: of the checkpoint.
  Returns:
    The whole path of `out`.
  Raises:
    ValueError: naming what is wrong.
  """
  if dtype not in ('as_stored', 'float32', 'bfloat16', 'float16'):
    raise ValueError(f"dtype={dtype!r}; allowed: 'as_stored', 'float32', 'bfloat16', 'float16'")
  if '://' in out:
    raise ValueError(f'out={out!r}: an import is written to a local folder; copy it from there')
  out = os.path.abspath(os.path.expanduser(out))
  if os.path.exists(out):
    raise ValueError(f'{out} exists already; give a new directory, or remove it')
  return out


class _Job:
  """One import: what is to be written, and what already has been."""

  def __init__(self, out: str, found: folder.Folder, leaves: Mapping[str, table.Leaf],
               pairs: list[tuple[table.Place, str]], *, structure: state_lib.Structure,
               dtype: DType):
    self.out, self.found, self.leaves, self.pairs = out, found, leaves, pairs
    self.work = f'{out}.partial'
    self.dtypes = _dtypes(found, pairs, dtype)
    self.shards = {path: shape.sharding.shard_shape(shape.shape)
                   for path, shape in state_lib.path_dict(structure.shapes).items()}
    self.source = found.fingerprint(dtype=dtype, shards=self.shards)
    self.sums = {path: integrity.Pieces() for path in leaves}
    self.writers: dict[str, arrays.Writer] = {}
    self.broken: list[str] = []

  def write(self) -> None:
    """Writes every tensor that has not been written before."""
    done = self._resume()
    stored = self.found.stored
    bar = progress.Progress('import', total=sum(stored[name].size for _, name in self.pairs))
    seen = sum(stored[name].size for _, name in self.pairs if name in done)
    bar.keep(seen)
    with open(os.path.join(self.work, _JOURNAL), 'a', encoding='utf-8') as journal:
      for place, name in self.pairs:
        if name in done:
          continue
        sums = self._write(place, name)
        if self.broken:
          continue  # Nothing of it will be kept, but all that is broken is told.
        journal.write(json.dumps({'tensor': name, 'sums': sums}) + '\n')
        journal.flush()
        seen += stored[name].size
        bar.update(seen)
    bar.close()
    if self.broken:
      raise NotFinite('\n'.join(self.broken))

  def _write(self, place: table.Place, name: str) -> dict[str, tuple[int, int]]:
    """Writes one tensor; returns what it adds to the checksums of our parameters."""
    tensor, added = self.found.stored[name].read(), {}
    if tensor.dtype == np.float64:
      with np.errstate(over='ignore'):
        tensor = tensor.astype(np.float32)
    for path, value in table.to_ours(place, tensor, self.leaves):
      writer, sums = self._writer(path, place), integrity.Pieces()
      writer.write(place.index, value, sums)
      writer.flush()
      if sums.not_finite:
        self.broken.append(f'{self.found.stored[name].path}: {name} holds {sums.not_finite} values '
                           f'that are NaN or infinite as {self.dtypes[path]}; the file is damaged, '
                           f'or the model diverged')
      added[path] = sums.sums
      self._add(path, sums.sums)
    return added

  def _writer(self, path: str, place: table.Place) -> arrays.Writer:
    if path not in self.writers:
      self.writers[path] = arrays.Writer(
          os.path.join(self.work, _ARRAYS), name=f'params/{path}', shape=self.leaves[path].shape,
          dtype=self.dtypes[path], leading=len(place.index), shard=self.shards[path])
    return self.writers[path]

  def _add(self, path: str, sums: tuple[int, int]) -> None:
    have = self.sums[path].sums
    self.sums[path].sums = ((have[0] + sums[0]) % 2**32, (have[1] + sums[1]) % 2**32)

  def _resume(self) -> set[str]:
    """What an interrupted import of the same files has finished; makes the folders."""
    path = os.path.join(self.work, _JOURNAL)
    lines: list[dict[str, Any]] = []
    if os.path.exists(path):
      with open(path, encoding='utf-8') as file:
        # A line that was cut by a kill is a tensor to write again.
        lines = [json.loads(line) for line in file if line.endswith('\n')]
    if not lines or lines[0].get('source') != self.source:
      folder.discard(self.work, _JOURNAL)
      os.makedirs(self.work)
      lines = [{'source': self.source}]
    else:
      os.makedirs(os.path.join(self.work, _ARRAYS), exist_ok=True)
      arrays.unframe(os.path.join(self.work, _STEP), arrays=os.path.join(self.work, _ARRAYS))
      print(f'import: going on after {len(lines) - 1} of {len(self.pairs)} tensors',
            file=sys.stderr)
    with open(path, 'w', encoding='utf-8') as file:
      file.writelines(json.dumps(line) + '\n' for line in lines)
    os.makedirs(os.path.join(self.work, _ARRAYS), exist_ok=True)
    done = {line['tensor']: line['sums'] for line in lines[1:]}
    for sums in done.values():
      for ours, pair in sums.items():
        self._add(ours, (pair[0], pair[1]))
    return set(done)

  def finish(self) -> None:
    """Frames the arrays as a checkpoint, adds the other files, and lets the target appear."""
    found, work = self.found, self.work
    tensors = {f'params/{path}': {
        'shape': list(leaf.shape), 'dtype': self.dtypes[path],
        'checksum': integrity.sums_text(self.sums[path].sums)}
        for path, leaf in self.leaves.items()}
    kinds = {name: found.stored[name].dtype for _, name in self.pairs}
    usual = max(sorted(set(kinds.values())), key=list(kinds.values()).count)
    extra = {'imported': {
        'family': found.family.name, 'model_type': found.values['model_type'], 'dtype': usual,
        'other_dtypes': {place.theirs: kinds[name] for place, name in self.pairs
                         if kinds[name] != usual},
        **({'settled': found.settled} if found.settled else {})}}
    body = {'format': integrity.FORMAT, 'step': int(_STEP), 'tensors': tensors, 'extra': extra}
    arrays.frame(os.path.join(work, _STEP), arrays=os.path.join(work, _ARRAYS),
                 manifest=integrity.seal(body))
    folder.keep_files(found.path, os.path.join(work, KEPT))
    # Nothing is computed with them, but an export gives them back.
    spare = {name: one for name, one in found.stored.items()
             if name not in kinds and found.family.canonical(name) in found.family.spare}
    if spare:
      os.makedirs(os.path.join(work, KEPT, SPARE))
      safetensors.write(os.path.join(work, KEPT, SPARE), [
          safetensors.Planned(name, one.dtype, one.shape) for name, one in spare.items()],
          (one.read() for one in spare.values()), shard_size=10**12)
    with open(os.path.join(work, MODEL_FILE), 'w', encoding='utf-8') as file:
      file.write(modelfile.text(found.family.model(config=found.config), about=(
          f'A {found.family.name}, imported from {os.path.basename(found.path)}.')))
    os.rmdir(os.path.join(work, _ARRAYS))
    os.rename(work, self.out)
    # After the rename: without it, what a kill leaves would not be known as ours.
    os.remove(os.path.join(self.out, _JOURNAL))


def _dtypes(found: folder.Folder, pairs: list[tuple[table.Place, str]], dtype: DType
            ) -> dict[str, str]:
  """The dtype of each of our parameters: the widest of the tensors it is made of."""
  kinds: dict[str, set[str]] = {}
  for place, name in pairs:
    for part in place.row.parts:
      kinds.setdefault(part.ours, set()).add(DTYPES[found.stored[name].dtype])
  if dtype != 'as_stored':
    return dict.fromkeys(kinds, dtype)
  return {path: names.pop() if len(names) == 1 else 'float32' for path, names in kinds.items()}
