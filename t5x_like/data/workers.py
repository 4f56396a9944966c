"""Processes that write the shards of a store."""

import concurrent.futures
import contextlib
import functools
import json
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from t5x_like.data import shards, textfiles
from t5x_like.data.texttasks import Preparable, Unit

Submit = Callable[[int, Unit, str], 'concurrent.futures.Future[shards.ShardInfo]']


class Job(NamedTuple):
  """What a worker needs to write any shard of one store.

  Attributes:
    task: with its vocabularies.
    split: of the task.
    directory: where the shards go.
    features: vocabulary size of each.
  """

  task: Preparable
  split: str
  directory: str
  features: dict[str, int]


@contextlib.contextmanager
def pool(job: Job, *, processes: int) -> Iterator[tuple[Submit, Callable[[], int]]]:
  """Opens workers; gives a function that hands them a shard, and one for the bytes they have done.

  Args:
    job: what they work on.
    processes: how many; up to 1 works in a thread of this one.

  Raises:
    RuntimeError: a worker died.
  """
  if processes <= 1:
    here = _Worker(job, None)
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
      try:
        yield functools.partial(threads.submit, here.shard), lambda: here.bytes
      finally:
        threads.shutdown(cancel_futures=True)
    return
  # Spawned, since forking a process with threads (TensorFlow's, or JAX's) can hang it.
  context = multiprocessing.get_context('spawn')
  counter = context.Value('q', 0)
  # Pickled here and not by the pool, which cannot say what is wrong when it fails to unpickle.
  arguments = (pickle.dumps(job), counter)
  with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context, initializer=_start,
                                              initargs=arguments) as workers:
    try:
      yield functools.partial(workers.submit, _work), lambda: counter.value
    except concurrent.futures.process.BrokenProcessPool:
      raise RuntimeError(f'a process preparing {job.task.name!r} died (out of memory?); run again '
                         f'to go on, perhaps with fewer processes') from None
    finally:
      workers.shutdown(cancel_futures=True)


def read_skipped(directory: str, index: int) -> list[textfiles.Skipped]:
  """Returns what was left out of a written shard."""
  with open(_skipped_file(directory, index), encoding='utf-8') as file:
    return [textfiles.Skipped(*entry) for entry in json.load(file)]


class _Worker:
  """Writes shards, and counts the bytes of input it is through with."""

  def __init__(self, job: Job, counter: Any):
    self._job, self._counter = job, counter
    self.bytes = 0

  def shard(self, index: int, unit: Unit, key: str) -> shards.ShardInfo:
    job = self._job
    return shards.write_shard(job.directory, index=index, features=job.features, key=key,
                              documents=self._documents(index, unit))

  def _documents(self, index: int, unit: Unit) -> Iterator[dict[str, Any]]:
    left = unit.bytes
    skipped: list[textfiles.Skipped] = []
    for document in self._job.task.documents(unit, split=self._job.split, skipped=skipped):
      yield document
      count = min(document['text_bytes'], left)
      left -= count
      self._add(count)
    # Written before the shard counts as finished, so that no resumed store lacks it.
    with shards.atomic_file(_skipped_file(self._job.directory, index)) as file:
      file.write(json.dumps(skipped).encode())
    self._add(left)

  def _add(self, count: int) -> None:
    if self._counter is None:
      self.bytes += count
      return
    with self._counter.get_lock():
      self._counter.value += count


class _Process:
  """What a worker process was started with; the job is read when the first shard comes."""

  job: bytes = b''
  counter: Any = None
  worker: _Worker | None = None


def _start(job: bytes, counter: Any) -> None:
  # Ctrl-C reaches the parent, which cancels; and no worker outlives a parent that was killed.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  parent = multiprocessing.parent_process()
  assert parent is not None

  def watch() -> None:
    parent.join()
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()
  _Process.job, _Process.counter = job, counter


def _work(index: int, unit: Unit, key: str) -> shards.ShardInfo:
  if _Process.worker is None:
    _Process.worker = _Worker(pickle.loads(_Process.job), _Process.counter)
  return _Process.worker.shard(index, unit, key)


def _skipped_file(directory: str, index: int) -> str:
  return os.path.join(directory, f'shard-{index:05d}.skipped.json')
