"""Turns tasks into token stores, as gin/data/text.gin says for a folder of text."""

import dataclasses
import importlib
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal

from t5x_like import config
from t5x_like.data import pieces, progress, textfiles, vocabularies, workers
from t5x_like.data import prepare as prepare_lib
from t5x_like.data import store as store_lib
from t5x_like.data.texttasks import Mixture, Preparable, TextTask

# Named rather than imported: it loads TensorFlow, which folders of text do not need.
_SEQIO_TASKS = 't5x_like.data.tasks'

Task = Preparable | Mixture | str
Naming = Literal['plain', 'content']


def prepare(*, task: Task | Sequence[Task], store_dir: str,
            vocabulary: vocabularies.Vocabulary | pieces.Training | str | None = None,
            splits: Sequence[str] | None = None, processes: int | None = None,
            existing: prepare_lib.Existing = 'refuse', naming: Naming = 'plain',
            extra_ids: int | None = None) -> dict[str, store_lib.Store]:
  """Writes the token stores of tasks and mixtures, or finds them already written.

  Args:
    task: text tasks, mixtures of them, or names of seqio Tasks and Mixtures whose module has been
      imported; one or several.
    store_dir: stores are `<store_dir>/<task>/<split>`.
    vocabulary: for text tasks without one: 'bytes', the path of a .model or tokenizer.json, a
      vocabulary, or a `Training`, which learns one from the train splits.
    splits: those to write; default 'train' and, if the task has it, 'validation'.
    processes: that work at once; default one per core.
    existing: 'refuse' or 'rebuild' a finished store made from something else.
    naming: 'plain' calls stores as the tasks; 'content' adds a hash of all that decides their
      tokens, so that stores of other text stay as they are, and prints each name. For text tasks.
    extra_ids: sentinels at the end of `vocabulary`, ids that no text has: span corruption needs one
      per span of a row, masking one; None: as the vocabulary's own files say, else none.

  Returns:
    The stores by '<task>/<split>'.

  Raises:
    ValueError: bad input, named with file and line, or a store that exists and differs.
  """
  if processes is not None and processes < 1:
    raise ValueError(f'processes={processes} must be at least 1')
  processes = processes or len(os.sched_getaffinity(0))
  if existing not in ('refuse', 'rebuild'):
    raise ValueError(f"existing={existing!r} is unknown; allowed: 'refuse', 'rebuild'")
  if naming not in ('plain', 'content'):
    raise ValueError(f"naming={naming!r} is unknown; allowed: 'plain', 'content'")
  store_dir = os.path.expanduser(store_dir)
  mixtures, tasks = _resolved(task)
  for one in tasks:  # Before a vocabulary is learnt and a train store written.
    if isinstance(one, TextTask) and 'validation' in _splits_of(one, splits):
      one.check_held_out()
  os.makedirs(store_dir, exist_ok=True)
  tasks = _with_vocabulary(tasks, vocabulary=vocabulary, store_dir=store_dir, extra_ids=extra_ids)
  if naming == 'content':
    tasks = _named_by_content(tasks, mixtures, store_dir=store_dir)
  stores: dict[str, store_lib.Store] = {}
  told: set[textfiles.Skipped] = set()
  with workers.Pool(processes) as pool:
    for one in tasks:
      for split in _splits_of(one, splits):
        built = prepare_lib.build(one, split=split, store_dir=store_dir, pool=pool,
                                  existing=existing)
        stores[f'{one.name}/{split}'] = built.store
        print('\n'.join(_summary(built, told=told)), file=sys.stderr)
        told.update(built.skipped)
  for mixture in mixtures:
    path = prepare_lib.write_mixture(mixture.name, rates=mixture.rate_table(), store_dir=store_dir)
    print(f'prepare: mixture {mixture.name} of {len(mixture.tasks)} tasks: {path}', file=sys.stderr)
  return stores


def dry_run(*, task: Task | Sequence[Task], store_dir: str,
            vocabulary: vocabularies.Vocabulary | pieces.Training | str | None = None,
            splits: Sequence[str] | None = None, processes: int | None = None,
            existing: prepare_lib.Existing = 'refuse', naming: Naming = 'plain',
            extra_ids: int | None = None) -> None:
  """Prints what `prepare` would read and which stores exist, and writes nothing.

  Args:
    task: as for `prepare`.
    store_dir: as for `prepare`.
    vocabulary: as for `prepare`.
    splits: as for `prepare`.
    processes: as for `prepare`.
    existing: as for `prepare`.
    naming: as for `prepare`.
    extra_ids: as for `prepare`.
  """
  said = 'as its files say' if extra_ids is None else extra_ids
  print(f'vocabulary: {vocabulary}; sentinels: {said}; processes: {processes or "one per core"}; '
        f'existing stores that differ: {existing}; names: {naming}')
  store_dir = os.path.expanduser(store_dir)
  for one in _resolved(task)[1]:
    files = one.files()
    print(f'task {one.name}: {len(files)} files, {sum(f.bytes for f in files) / 1e6:,.1f} MB; '
          f'splits: {", ".join(one.splits)}')
    for split in _splits_of(one, splits):
      path = os.path.join(store_dir, one.name, split)
      there = os.path.exists(os.path.join(path, store_lib.MANIFEST))
      print(f'  {path}: {"exists" if there else "to be written"}')


def _resolved(task: Task | Sequence[Task]) -> tuple[list[Mixture], list[Preparable]]:
  mixtures, tasks = [], {}
  for one in _flat(task):
    if isinstance(one, str):
      one = importlib.import_module(_SEQIO_TASKS).registered(one)
    if isinstance(one, Mixture):
      mixtures.append(one)
    for member in one.tasks if isinstance(one, Mixture) else [one]:
      if tasks.setdefault(member.name, member) is not member and tasks[member.name] != member:
        raise ValueError(f'two different tasks are called {member.name!r}')
  if not tasks:
    raise ValueError('there is no task to prepare')
  return mixtures, list(tasks.values())


def _splits_of(task: Preparable, splits: Sequence[str] | None) -> Sequence[str]:
  if splits is not None:
    return splits
  return ('train', 'validation') if 'validation' in task.splits else ('train',)


def _flat(task: Any) -> Iterator[Any]:
  if isinstance(task, list | tuple):
    for one in task:
      yield from _flat(one)
  else:
    yield task


def _with_vocabulary(tasks: list[Preparable], *, store_dir: str,
                     vocabulary: vocabularies.Vocabulary | pieces.Training | str | None,
                     extra_ids: int | None) -> list[Preparable]:
  without = [t for t in tasks if isinstance(t, TextTask) and t.vocabulary is None]
  if extra_ids is not None and extra_ids < 0:
    raise ValueError(f'extra_ids={extra_ids} must be 0 or more')
  if not without:
    for name, value in (('vocabulary', vocabulary), ('extra_ids', extra_ids)):
      if value is not None:
        raise ValueError(f'every task has its own vocabulary, so {name}={value} would have no '
                         f'effect; leave it out')
    return tasks
  if vocabulary is None:
    raise ValueError(f'task {without[0].name!r} has no vocabulary: set prepare.vocabulary to '
                     f"'bytes', to the path of a .model or tokenizer.json, or to "
                     f'@pieces.Training() to learn one')
  if isinstance(vocabulary, str):
    vocabulary = vocabularies.load(vocabulary, extra_ids=extra_ids)
  elif isinstance(vocabulary, pieces.Training):
    if extra_ids is not None:
      vocabulary = dataclasses.replace(vocabulary, extra_ids=extra_ids)
    vocabulary = prepare_lib.trained_vocabulary(vocabulary, tasks=without, store_dir=store_dir)
    print(f'prepare: vocabulary of {vocabulary.vocab_size} pieces: {vocabulary.path}',
          file=sys.stderr)
  elif extra_ids not in (None, vocabulary.extra_ids):
    raise ValueError(f'the vocabulary given has extra_ids={vocabulary.extra_ids} of its own, so '
                     f'extra_ids={extra_ids} would have no effect: set it where the vocabulary is '
                     f'made, as by vocabularies.load.extra_ids')
  given: list[Preparable] = []
  for task in tasks:
    if isinstance(task, TextTask) and task.vocabulary is None:
      task = task.with_vocabulary(vocabulary)
    given.append(task)
  return given


def _named_by_content(tasks: list[Preparable], mixtures: list[Mixture], *, store_dir: str
                      ) -> list[Preparable]:
  named: list[Preparable] = []
  for task in tasks:
    if mixtures or not isinstance(task, TextTask):
      raise ValueError(f"naming='content' is for text tasks alone, and {task.name!r} is "
                       f"{'in a mixture' if mixtures else 'none'}: set naming='plain'")
    named.append(prepare_lib.named_by_content(task, store_dir=store_dir))
    print(named[-1].name)
  return named


def _summary(built: prepare_lib.Built, *, told: Collection[textfiles.Skipped]) -> Iterator[str]:
  store = built.store
  tokens = sum(store.num_tokens(f) for f in store.features)
  yield (f'prepare: {store.path} {built.how} in {progress.duration(built.seconds)}: '
         f'{store.num_documents:,} documents, {store.text_bytes / 1e6:,.1f} MB, {tokens:,} tokens '
         f'({store.text_bytes / max(tokens, 1):.2f} bytes each), {store.fingerprint[:12]}')
  skipped = [s for s in built.skipped if s not in told]
  for name, reason in skipped[:5]:
    yield f'  left out: {name}: {reason}'
  if len(skipped) > 5:
    yield f'  and {len(skipped) - 5} more left out; manifest.json lists them'


if __name__ == '__main__':
  sys.exit(config.run('t5x_like.prepare.prepare'))
