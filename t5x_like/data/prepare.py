"""From a task to a token store: in parallel, resumable after a kill, reused when nothing changed.

A store is built under a hidden name beside its final one and renamed when it is whole. Shards that
were finished before a kill are kept, and since what goes into a shard depends on the inputs alone,
the store has the same fingerprint however often it was interrupted and however many processes
worked on it.
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from t5x_like.data import pieces, progress, shards, textfiles, vocabularies, workers
from t5x_like.data import store as store_lib
from t5x_like.data.texttasks import Preparable, TextTask, Unit, digest

_WORTH_A_PROCESS = 2 << 20  # Bytes of text that are tokenized while a process starts.

Existing = Literal['refuse', 'rebuild']


class Built(NamedTuple):
  """A finished store, how long it took and whether it was there before."""

  store: store_lib.Store
  seconds: float
  how: Literal['built', 'resumed', 'reused']
  skipped: list[textfiles.Skipped]


def build(task: Preparable, *, split: str, store_dir: str, pool: workers.Pool,
          existing: Existing = 'refuse') -> Built:
  """Writes the store of one split of a task, or finds it already written.

  Args:
    task: with its vocabularies.
    split: one of the task's.
    store_dir: the store is `<store_dir>/<task>/<split>`.
    pool: who works on it.
    existing: what to do with a finished store made from something else: 'refuse' stops, 'rebuild'
      replaces it once the new one is whole.

  Raises:
    ValueError: bad input, named with file and line; an existing store that differs; an unknown
      split.
  """
  began = time.monotonic()
  if pool.processes > 1 and not task.portable:
    print(f'prepare: {task.name} in one process, since no module that other processes could import '
          f'registers it', file=sys.stderr)
    pool = workers.Pool(1)
  if split not in task.splits:
    raise ValueError(f'task {task.name!r} has no split {split!r}; it has: {", ".join(task.splits)}')
  if split == 'validation' and isinstance(task, TextTask):
    task.check_held_out()
  parent = os.path.join(store_dir, task.name)
  os.makedirs(parent, exist_ok=True)
  with _locked(os.path.join(parent, f'.{split}.lock')):
    final, directory = os.path.join(parent, split), os.path.join(parent, f'.{split}.building')
    inputs = input_hashes(task.files(), cache=os.path.join(parent, '.inputs.json'),
                          threads=pool.processes)
    if os.path.exists(os.path.join(final, store_lib.MANIFEST)):
      store = store_lib.Store(final)
      changes = differences(store, task=task, split=split, inputs=inputs)
      if not changes:
        return Built(store, time.monotonic() - began, 'reused', _skipped_of(store))
      if existing == 'refuse':
        raise ValueError(f'{final} is a finished store of something else ({"; ".join(changes)}). '
                         f"Runs may depend on it: use another task name or store_dir, or set "
                         f"existing='rebuild' to replace it")
    elif os.path.isdir(final):
      raise ValueError(f'{final} exists but is no finished store (it has no manifest.json): move '
                       f'it away')
    resumed = os.path.isdir(directory)
    store = _write(task, split=split, directory=directory, inputs=inputs, pool=pool)
    _swap(directory, final)
    return Built(store_lib.Store(final), time.monotonic() - began,
                 'resumed' if resumed else 'built', _skipped_of(store))


def definition(task: Preparable, *, split: str) -> dict[str, Any]:
  """Returns what a manifest says about the task: all that decides the tokens, inputs apart."""
  fingerprints = {n: v.fingerprint() for n, v in sorted(task.feature_vocabularies.items())}
  moved = task.division().moved if isinstance(task, TextTask) else None
  return {'name': task.name, 'split': split, **task.definition(), 'vocabularies': fingerprints,
          **({'moved': moved.hex()} if moved else {})}


def differences(store: store_lib.Store, *, task: Preparable, split: str,
                inputs: Mapping[str, tuple[str, int]]) -> list[str]:
  """Returns in words how a finished store differs from what a task would give now."""
  changes = []
  new, old = definition(task, split=split), store.manifest['task']
  new = json.loads(json.dumps(new))
  for key in sorted(set(new) | set(old)):
    if new.get(key) != old.get(key):
      shown = '' if key == 'vocabularies' else f' was {old.get(key)!r}, now {new.get(key)!r}'
      changes.append(f'{key}{shown or " differ"}')
  said = store.manifest['vocabulary']
  used = task.feature_vocabularies.get('targets') or next(iter(task.feature_vocabularies.values()))
  changes += [f'{key} was {said.get(key)}, now {getattr(used, key)}'
              for key in ('bos_id', 'unk_id') if said.get(key) != getattr(used, key)]
  before = {i['file']: (i['sha256'], i['bytes']) for i in store.manifest['inputs']}
  for verb, names in (('added', [n for n in inputs if n not in before]),
                      ('removed', [n for n in before if n not in inputs]),
                      ('changed', [n for n in inputs if before.get(n, inputs[n]) != inputs[n]])):
    if names:
      more = f' and {len(names) - 3} more' if len(names) > 3 else ''
      changes.append(f'{len(names)} input files {verb}: {", ".join(names[:3])}{more}')
  return changes


def input_hashes(files: Sequence[textfiles.File], *, cache: str, threads: int
                 ) -> dict[str, tuple[str, int]]:
  """Returns (sha256, bytes) of each input by name, reading only those whose size or time changed.

  Args:
    files: to hash.
    cache: file that remembers hashes by path, size and modification time.
    threads: that read at once.

  Raises:
    ValueError: a file that cannot be read.
  """
  known: dict[str, list] = {}
  with contextlib.suppress(OSError, ValueError), open(cache, encoding='utf-8') as file:
    known = json.load(file)

  def stamped(file: textfiles.File) -> list:
    path = os.path.realpath(file.path)
    try:
      stat = os.stat(path)
      stamp = [stat.st_size, stat.st_mtime_ns]
      before = known.get(path, [])
      return before if before[:2] == stamp else [*stamp, shards.sha256_of(path)]
    except OSError as error:
      raise ValueError(f'cannot read {file.path}: {error.strerror}') from None

  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    found = list(pool.map(stamped, files))
  now = {os.path.realpath(f.path): stamp for f, stamp in zip(files, found, strict=True)}
  if any(known.get(path) != stamp for path, stamp in now.items()):
    with shards.atomic_file(cache) as out:
      out.write(json.dumps({**known, **now}).encode())
  return {f.name: (stamp[2], stamp[0]) for f, stamp in zip(files, found, strict=True)}


def trained_vocabulary(training: pieces.Training, *, tasks: Sequence[Preparable], store_dir: str
                       ) -> vocabularies.Vocabulary:
  """Returns a vocabulary learnt from the train splits of text tasks, trained once per inputs.

  Args:
    training: how.
    tasks: where to take text from, an equal share of bytes each.
    store_dir: the model is kept in its folder 'vocabularies'.

  Raises:
    ValueError: a task whose text only TensorFlow can read.
  """
  folder = os.path.join(store_dir, 'vocabularies')
  os.makedirs(folder, exist_ok=True)
  samples = []
  # Sentinels are not learnt: with any number of them the pieces are those of the same file.
  parts: list[Any] = [[(k, v) for k, v in training.__dict__.items() if k != 'extra_ids']]
  for task in tasks:
    if not isinstance(task, TextTask):
      raise ValueError(f'cannot train a vocabulary on {task.name!r}: it comes with its own')
    inputs = input_hashes(task.files(), cache=os.path.join(folder, f'.{task.name}.inputs.json'),
                          threads=2)
    source = {k: v for k, v in task.definition().items() if k != 'eos'}
    moved = task.division().moved
    parts.append([source, sorted(inputs.items()), *([moved.hex()] if moved else [])])
    samples.append(task.sample(training.sample_bytes // len(tasks)))
  path = os.path.join(folder, f'{tasks[0].name}-{training.vocab_size}-{digest(parts)[:12]}.model')
  if not os.path.exists(path):
    print(f'prepare: learning a vocabulary of {training.vocab_size} pieces', file=sys.stderr)
    pieces.train_sentencepiece((text for sample in samples for text in sample), path=path,
                               vocab_size=training.vocab_size, model=training.model,
                               sample_bytes=training.sample_bytes)
  return vocabularies.SentencePieceVocabulary(path, extra_ids=training.extra_ids)


def named_by_content(task: TextTask, *, store_dir: str) -> TextTask:
  """Returns the task under a name that tells its text, its reading and its vocabulary apart.

  Args:
    task: with its vocabulary.
    store_dir: where hashes of the inputs are remembered, in its folder 'vocabularies'.
  """
  folder = os.path.join(store_dir, 'vocabularies')
  os.makedirs(folder, exist_ok=True)
  inputs = input_hashes(task.files(), cache=os.path.join(folder, f'.{task.name}.inputs.json'),
                        threads=2)
  key = digest([definition(task, split=''), sorted(inputs.items())])
  return dataclasses.replace(task, name=f'{task.name}.{key[:10]}')


def write_mixture(name: str, *, rates: Mapping[str, float], store_dir: str) -> str:
  """Writes `<store_dir>/mixtures/<name>.json`, from which training knows a mixture by name.

  Args:
    name: of the mixture.
    rates: of each task, > 0.
    store_dir: folder of the stores.

  Returns:
    The path written.
  """
  folder = os.path.join(store_dir, 'mixtures')
  os.makedirs(folder, exist_ok=True)
  path = os.path.join(folder, f'{name}.json')
  with shards.atomic_file(path) as file:
    file.write(json.dumps({'rates': dict(sorted(rates.items()))}, indent=1).encode())
  return path


def _write(task: Preparable, *, split: str, directory: str, inputs: Mapping[str, tuple[str, int]],
           pool: workers.Pool) -> store_lib.Store:
  os.makedirs(directory, exist_ok=True)
  # A kill after the manifest leaves a whole store that only lacks its name: build it anew, since
  # its inputs may have changed.
  if os.path.exists(os.path.join(directory, store_lib.MANIFEST)):
    shutil.rmtree(directory)
    os.makedirs(directory)
  defined = definition(task, split=split)
  units = task.units(split)
  vocabulary_of = task.feature_vocabularies
  features = {name: v.vocab_size for name, v in vocabulary_of.items()}
  keys = [digest([defined, features, unit.key, [(n, *inputs.get(n, ())) for n in unit.names]])
          for unit in units]
  job = workers.Job(task, split, directory, features)
  infos = _shards(job, units=units, keys=keys, pool=pool)
  if not any(i.documents for i in infos):
    raise ValueError(_nothing(task, split=split, units=len(units), directory=directory))
  skipped: dict[str, list[str]] = {}
  for index in range(len(units)):
    for name, reason in workers.read_skipped(directory, index):
      skipped.setdefault(name, []).append(reason)
  _clean(directory, keep=infos)
  vocabulary = vocabulary_of.get('targets') or next(iter(vocabulary_of.values()))
  return store_lib.finish_store(
    directory, shards=infos, features=features, task=defined,
    vocabulary=vocabularies.describe(vocabulary, directory=directory),
    inputs=[{'file': name, 'sha256': sha, 'bytes': size,
             **({'skipped': skipped[name]} if name in skipped else {})}
            for name, (sha, size) in inputs.items()])


def _shards(job: workers.Job, *, units: Sequence[Unit], keys: Sequence[str], pool: workers.Pool
            ) -> list[shards.ShardInfo]:
  total = sum(u.bytes for u in units)
  shown = progress.Progress(f'prepare {job.task.name}/{job.split}', total=total)
  infos: dict[int, shards.ShardInfo] = {}
  todo: list[int] = []
  for index, key in enumerate(keys):
    found = shards.read_shard(job.directory, index=index, key=key)
    if found is None:
      todo.append(index)
    else:
      infos[index] = found
  kept = total - sum(units[i].bytes for i in todo)
  shown.keep(kept)
  if infos:
    print(f'prepare {job.task.name}/{job.split}: {len(infos)} of {len(units)} shards are already '
          f'there', file=sys.stderr)
  worth = len(todo)
  if isinstance(job.task, TextTask):
    worth = min(worth, 1 + (total - kept) // _WORTH_A_PROCESS)
  with pool.serving(job, processes=worth) as (submit, done):
    waiting: dict[Any, int] = {submit(index, units[index], keys[index]): index for index in todo}
    while waiting:
      ready, _ = concurrent.futures.wait(waiting, timeout=0.2,
                                         return_when=concurrent.futures.FIRST_COMPLETED)
      for future in ready:
        infos[waiting.pop(future)] = future.result()
      shown.update(min(kept + done(), total),
                   sum(count for i in infos.values() for count in i.tokens.values()))
  shown.close()
  return [infos[i] for i in range(len(units))]


def _skipped_of(store: store_lib.Store) -> list[textfiles.Skipped]:
  return [textfiles.Skipped(i['file'], reason) for i in store.manifest['inputs']
          for reason in i.get('skipped', ())]


def _nothing(task: Preparable, *, split: str, units: int, directory: str) -> str:
  count = len(task.files())
  skipped = [s for i in range(units) for s in workers.read_skipped(directory, i)]
  text = f'split {split!r} of {task.name!r} has no document: {count} files were read'
  if skipped:
    text += f', {len(skipped)} left out ({skipped[0].name}: {skipped[0].reason})'
  return text


def _clean(directory: str, *, keep: Sequence[shards.ShardInfo]) -> None:
  known = {f'shard-{i.index:05d}' for i in keep}
  for name in os.listdir(directory):
    if name.endswith('.skipped.json') or name.split('.')[0] not in known:
      os.unlink(os.path.join(directory, name))


def _swap(new: str, final: str) -> None:
  if os.path.isdir(final):
    old = f'{new.removesuffix(".building")}.old'
    shutil.rmtree(old, ignore_errors=True)
    os.rename(final, old)
    os.rename(new, final)
    shutil.rmtree(old)
  else:
    os.rename(new, final)


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
  with open(path, 'w', encoding='utf-8') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      print(f'prepare: waiting for another process that prepares {os.path.dirname(path)}',
            file=sys.stderr)
      fcntl.flock(file, fcntl.LOCK_EX)
    yield
