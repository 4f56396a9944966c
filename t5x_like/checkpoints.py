"""Checkpoints: asynchronous, sharded, atomic, verified; damaged ones are named and skipped.

Layout: `<directory>/<step>/{state/, manifest/}`, written by Orbax. A checkpoint exists once Orbax
has put its commit marker in place, so a reader sees a whole one or none. The manifest holds every
tensor's shape, dtype and checksum and the caller's `extra`.
"""

import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.utils import TMP_DIR_SUFFIX

from t5x_like import chunks, integrity

_COMMIT = 'commit_success.txt'


class Checkpointer:
  """Saves and restores the state of one run in one directory."""

  def __init__(self, directory: epath.PathLike, *, every: int, keep: int = 3,
               keep_every: int | None = None, mode: Literal['async', 'sync'] = 'async'):
    """Makes a checkpointer; nothing is written before the first save.

    Args:
      directory: local path or gs:// address; made when missing.
      every: save at multiples of this many steps, >= 1.
      keep: how many of the newest checkpoints stay, >= 1.
      keep_every: checkpoints at multiples of this many steps stay for ever; None: none do.
      mode: 'async': save returns once the state is copied to the host; 'sync': once it is on disk.
    Raises:
      ValueError: a number is below 1, or an unknown mode.
    """
    for name, value in (('every', every), ('keep', keep), ('keep_every', keep_every)):
      if value is not None and value < 1:
        raise ValueError(f'Checkpointer {name}={value}: allowed are integers from 1')
    if mode not in ('async', 'sync'):
      raise ValueError(f"Checkpointer mode={mode!r}: allowed are 'async' and 'sync'")
    self.directory = _absolute(directory)
    self.last_error: Exception | None = None
    self.every, self._keep, self._keep_every, self._mode = every, keep, keep_every, mode
    self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
    self._follower: threading.Thread | None = None
    self._set_aside: dict[int, str] = {}
    self._unclean = True

  def save(self, step: int, state: Any, *, extra: Mapping[str, Any], force: bool = False) -> bool:
    """Saves the state of a step, if it is due; the state may be donated once this returns.

    A failed write is told on stderr and kept in `last_error`; older checkpoints stay as they are
    and the next save tries again.

    Args:
      step: finished steps.
      state: tree of arrays.
      extra: JSON values stored in the same checkpoint.
      force: save even if the step is no multiple of `every`.
    Returns:
      Whether a checkpoint was started (sync: written). False: not due, already there, or failed.
    Raises:
      ValueError: a leaf is no array, or `extra` is not JSON.
    """
    step = int(step)
    if not force and step % self.every:
      return False
    self.wait()
    if step not in self._set_aside and _committed(self.directory / str(step)):
      return False
    named = integrity.named_leaves(state)
    tensors = integrity.describe(named)
    for name in [name for name, x in named.items() if integrity.is_key(x)]:
      tensors[name]['key_impl'] = str(jax.random.key_impl(named[name]))
      named[name] = jax.random.key_data(named[name])
    for name, checksum in integrity.checksums(named).items():
      tensors[name]['checksum'] = checksum
    manifest = integrity.seal(
        {'format': integrity.FORMAT, 'step': step, 'tensors': tensors, 'extra': extra})
    tree = integrity.nest(named)
    try:
      self._clean()
      self._writer.save(self.directory / str(step), args=ocp.args.Composite(
          state=ocp.args.PyTreeSave(tree, save_args=jax.tree.map(chunks.save_args, tree)),
          manifest=ocp.args.JsonSave(manifest)))
    except Exception as error:  # Whatever the file system does, the run goes on.
      self._failed(step, error)
      return False
    self._follower = threading.Thread(target=self._finish, args=(step,), name='checkpoint')
    self._follower.start()
    if self._mode == 'sync':
      self.wait()
      return self.last_error is None
    return True

  def finish(self, step: int, state: Any, *, extra: Mapping[str, Any]) -> None:
    """Saves a state, due or not, that no later save would make up for, and waits for it.

    Args:
      step: finished steps.
      state: tree of arrays.
      extra: JSON values stored in the same checkpoint.
    Raises:
      OSError: it could not be written, nor at a second attempt.
    """
    for _ in range(2):
      self.save(step, state, extra=extra, force=True)
      self.wait()
      if _everywhere(self.last_error is None):
        return
    raise OSError(
        f'the state after update {step} is not saved, tried twice: {_brief_of(self.last_error)}. '
        f'Make room or mend {self.directory}, then run the same command again; complete '
        f'checkpoints there: {_list_or_none(self.directory)}')

  def restore(self, abstract_state: Any, *, step: int | None = None
              ) -> tuple[int, Any, dict[str, Any]] | None:
    """Restores the newest good checkpoint onto the shardings of the abstract state.

    Every tensor's checksum is computed again and compared. Damaged checkpoints are named on stderr
    and skipped; the next save sets them aside (renamed, not deleted), and with them every
    checkpoint newer than the one restored.

    Args:
      abstract_state: tree of jax.ShapeDtypeStruct with shardings (or of arrays).
      step: this one only; None: the newest good one.
    Returns:
      (step, state, extra), or None where the directory holds no checkpoint.
    Raises:
      ValueError: the step does not exist, the checkpoint belongs to another model (all differences
        are listed), or no checkpoint is good.
    """
    self.wait()
    steps = self.steps()
    if not steps and step is None:
      return None
    found, state, extra, bad = _newest_good(self.directory, steps, step, abstract_state)
    self._set_aside = {s: 'damaged' if s in bad else 'abandoned' for s in steps if s > found}
    return found, state, extra

  def steps(self) -> list[int]:
    """Returns the steps of all complete checkpoints, ascending."""
    return _steps(self.directory)

  def wait(self) -> None:
    """Waits until the save under way, if any, is on disk or has failed."""
    if self._follower is not None:
      self._follower.join()
      self._follower = None

  def close(self) -> None:
    """Waits for the save under way and frees the writer's threads."""
    self.wait()
    self._writer.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *unused) -> None:
    self.close()

  def _finish(self, step: int) -> None:
    try:
      self._writer.wait_until_finished()
    except Exception as error:  # In a thread an exception would go unseen.
      self._failed(step, error)
      return
    self.last_error = None
    try:
      self._prune()
    except Exception as error:
      _tell(f'could not remove old checkpoints from {self.directory}: {_brief_of(error)}')

  def _failed(self, step: int, error: Exception) -> None:
    self.last_error, self._unclean = error, True
    _tell(f'checkpoint {self.directory / str(step)} was NOT saved: {_brief_of(error)}. '
          f'The next save tries again. Complete checkpoints: {_list_or_none(self.directory)}')
    try:
      self._clean()
    except OSError as again:
      _tell(f'could not remove what the failed save left in {self.directory}: {again}')

  def _clean(self) -> None:
    """Removes what an interrupted or failed save left behind; moves aside what restore refused."""
    if not self._unclean or jax.process_index() != 0:
      return
    self.directory.mkdir(parents=True, exist_ok=True)
    for path in self.directory.iterdir():
      if TMP_DIR_SUFFIX in path.name or (path.name.isdigit() and not _committed(path)):
        path.rmtree(missing_ok=True)
    for step, reason in self._set_aside.items():
      if not (self.directory / str(step)).exists():
        continue
      number = 0
      while (target := self.directory / f'{reason}-{step}-{number}').exists():
        number += 1
      (self.directory / str(step)).rename(target)
      _tell(f'checkpoint {step} ({reason}) is now {target}')
    self._set_aside, self._unclean = {}, False

  def _prune(self) -> None:
    if jax.process_index() != 0:
      return
    for step in self.steps()[:-self._keep]:
      if self._keep_every is None or step % self._keep_every:
        # Without its marker it is no checkpoint any more, however far the removal gets.
        (self.directory / str(step) / _COMMIT).unlink(missing_ok=True)
        (self.directory / str(step)).rmtree(missing_ok=True)


def load_params(path: epath.PathLike, abstract_params: Any, *, step: int | None = None,
                which: Literal['params', 'ema', 'evaluated'] = 'params') -> Any:
  """Loads and verifies the weights only, onto any mesh.

  Args:
    path: a run's checkpoint directory, or one checkpoint in it.
    abstract_params: tree of jax.ShapeDtypeStruct, with shardings or for one device; a floating
      dtype other than the saved one is cast after verification.
    step: this one only; None: the newest good one.
    which: the weights being trained, their average, or ('evaluated') the average if there is one.
  Returns:
    The parameters as a tree like `abstract_params`.
  Raises:
    ValueError: no checkpoint there, none good, or tensors missing, left over or of another shape
      (all listed, with the nearest names).
  """
  return load_weights(path, abstract_params, step=step, which=which)[1]


def load_weights(path: epath.PathLike, abstract_params: Any, *, step: int | None = None,
                 which: str = 'params') -> tuple[int, Any]:
  """As `load_params`, behind the step of the checkpoint that was read."""
  trees = {'params': ('params',), 'ema': ('ema',), 'evaluated': ('ema', 'params')}
  if which not in trees:
    raise ValueError(f'load_params which={which!r}: allowed are {", ".join(trees)}')
  path = _absolute(path)
  if path.name.isdigit() and step is None and _committed(path):
    path, step = path.parent, int(path.name)
  steps = _steps(path)
  if not steps:
    raise ValueError(f'no complete checkpoint in {path}; give the directory of the <step>/ folders')
  return _newest_good(path, steps, step, abstract_params, trees=trees[which])[:2]


def _absolute(path: epath.PathLike) -> epath.Path:
  return epath.Path(path) if '://' in str(path) else epath.Path(path).expanduser().resolve()


def _newest_good(directory: epath.Path, steps: list[int], step: int | None, abstract: Any, *,
                 trees: Sequence[str] = ()) -> tuple[int, Any, dict[str, Any], dict[int, str]]:
  """Returns step, state and extra of the newest good checkpoint, and what ails those skipped."""
  if step is not None and step not in steps:
    raise ValueError(f'no complete checkpoint of step {step} in {directory}; there are {steps}')
  bad: dict[int, str] = {}
  for candidate in [step] if step is not None else reversed(steps):
    path, damage, result = directory / str(candidate), '', None
    try:
      result = _load(path, abstract, trees)
    except integrity.Damaged as error:
      damage = str(error)
    if _everywhere(not damage) and result is not None:
      return candidate, *result, bad
    bad[candidate] = damage or 'damaged as another process sees it'
    _tell(f'checkpoint {path} is damaged and is not used: {bad[candidate]}')
  listed = '\n'.join(f'  {directory / str(s)}: {text}' for s, text in bad.items())
  raise ValueError(f'no usable checkpoint in {directory}:\n{listed}\n'
                   'Restore the files from a backup, or start in an empty directory')


def _load(path: epath.Path, abstract: Any, trees: Sequence[str]) -> tuple[Any, dict[str, Any]]:
  """Reads and verifies a checkpoint, or the first of the given trees that it has.

  Raises Damaged, or ValueError where it is another model's.
  """
  body = read_manifest(path)
  saved, wanted = body['tensors'], integrity.named_leaves(abstract)
  if trees:
    roots = {name.split('/')[0] for name in saved}
    root = next((tree for tree in trees if tree in roots), trees[0])
    saved = {name: tensor for name, tensor in saved.items() if name.startswith(f'{root}/')}
    wanted = {f'{root}/{name}': leaf for name, leaf in wanted.items()}
  lines = integrity.differences(saved, integrity.describe(wanted), casts=bool(trees))
  if lines:
    raise ValueError(f'checkpoint {path} does not fit this model, {len(lines)} differences:\n  '
                     + '\n  '.join(lines))
  leaves = list(load_tensors(path, wanted, saved).values())
  return jax.tree.unflatten(jax.tree.structure(abstract), leaves), body['extra']


def read_manifest(path: epath.PathLike) -> dict[str, Any]:
  """What one checkpoint, `<directory>/<step>`, says it holds; raises integrity.Damaged."""
  where = _absolute(path) / 'manifest'
  try:
    manifest = ocp.JsonCheckpointHandler().restore(where)
  except Exception as error:
    raise integrity.Damaged(f'its manifest {where} cannot be read: {_brief(error)}') from error
  return integrity.unseal(manifest)


def load_tensors(path: epath.PathLike, wanted: Mapping[str, Any], saved: Mapping[str, Any]
                 ) -> dict[str, jax.Array]:
  """Reads and verifies tensors of one checkpoint, any of them; raises integrity.Damaged.

  Args:
    path: `<directory>/<step>`.
    wanted: full name to ShapeDtypeStruct or array, whose dtype and sharding the result has.
    saved: the manifest's 'tensors'.
  """
  state = _absolute(path) / 'state'
  plain = _read(state, wanted, saved)
  sums = integrity.checksums(plain)
  wrong = [name for name in sums if sums[name] != saved[name]['checksum']]
  if wrong:
    raise integrity.Damaged('tensors differ from what was saved: ' + ', '.join(
        f"{name} (checksum {sums[name]}, saved {saved[name]['checksum']})" for name in wrong)
        + f'; files under {state}')
  return {name: _as_wanted(plain[name], leaf, saved[name]) for name, leaf in wanted.items()}


def _read(path: epath.Path, wanted: Mapping[str, Any], saved: Mapping[str, Any]
          ) -> dict[str, jax.Array]:
  """Reads tensors in their saved dtype onto the wanted shardings; random keys as their data."""
  items, restore_args = {}, {}
  for name, leaf in wanted.items():
    if integrity.is_key(leaf):
      stored = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
      shape, dtype = stored.shape, stored.dtype
    else:
      shape, dtype = leaf.shape, jax.numpy.dtype(saved[name]['dtype'])
    sharding = getattr(leaf, 'sharding', None)
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    items[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    restore_args[name] = ocp.ArrayRestoreArgs(sharding=sharding, global_shape=shape, dtype=dtype)
  try:
    tree = ocp.PyTreeCheckpointHandler().restore(path, args=ocp.args.PyTreeRestore(
        item=integrity.nest(items), restore_args=integrity.nest(restore_args),
        partial_restore=True))
  except jax.errors.JaxRuntimeError:
    raise  # Out of device memory, say, is no damage.
  except Exception as error:
    raise integrity.Damaged(f'its tensors in {path} cannot be read: {_brief(error)}') from error
  return integrity.named_leaves(tree)


def _as_wanted(x: jax.Array, leaf: Any, tensor: Mapping[str, Any]) -> jax.Array:
  if integrity.is_key(leaf):
    return jax.random.wrap_key_data(x, impl=tensor['key_impl'])
  return x.astype(leaf.dtype)


def _everywhere(fine: bool) -> bool:
  """Whether all processes agree; one that cannot read must not leave the others in a collective."""
  if jax.process_count() == 1:
    return fine
  return bool(multihost_utils.process_allgather(np.array(fine)).all())


def _committed(path: epath.Path) -> bool:
  return (path / _COMMIT).exists()


def _steps(directory: epath.Path) -> list[int]:
  if not directory.exists():
    return []
  return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit() and _committed(p))


def steps(directory: epath.PathLike) -> list[int]:
  """The steps of all complete checkpoints in a directory, ascending."""
  return _steps(_absolute(directory))


def _list_or_none(directory: epath.Path) -> str:
  try:
    return str(_steps(directory) or 'none')
  except OSError:
    return 'unknown (the directory cannot be read)'


def _brief_of(error: BaseException | None) -> str:
  return 'another process failed' if error is None else f'{type(error).__name__}: {_brief(error)}'


def _brief(error: BaseException) -> str:
  text = ' '.join(str(error).split())
  return text if len(text) <= 500 else f'{text[:500]} ...'


def _tell(text: str) -> None:
  print(text, file=sys.stderr, flush=True)
