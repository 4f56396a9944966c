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


class Pool:
  """Worker processes, started when first needed and kept for the stores that follow.

  Args:
    processes: how many; 1 works in a thread of this process.
  """

  def __init__(self, processes: int):
    self.processes = processes
    # Spawned, since forking a process with threads (TensorFlow's, or JAX's) can hang it.
    self._context = multiprocessing.get_context('spawn')
    self._counter: Any = None
    self._workers: concurrent.futures.ProcessPoolExecutor | None = None

  def __enter__(self) -> 'Pool':
    return self

  def __exit__(self, *_: object) -> None:
    if self._workers is not None:
      self._workers.shutdown(cancel_futures=True)

  @contextlib.contextmanager
  def serving(self, job: Job, *, processes: int) -> Iterator[tuple[Submit, Callable[[], int]]]:
    """Gives a function that hands workers a shard, and one for the bytes they have done.

    Args:
      job: what they work on.
      processes: how many are worth it; up to 1 works in a thread of this process.

    Raises:
      RuntimeError: a worker died.
    """
    if min(processes, self.processes) <= 1:
      here = _Worker(job, None)
      with concurrent.futures.ThreadPoolExecutor(1) as threads:
        try:
          yield functools.partial(threads.submit, here.shard), lambda: here.bytes
        finally:
          threads.shutdown(cancel_futures=True)
      return
    if self._workers is None:
      self._counter = self._context.Value('q', 0)
      self._workers = concurrent.futures.ProcessPoolExecutor(
        self.processes, mp_context=self._context, initializer=_start, initargs=(self._counter,))
    counter, before = self._counter, self._counter.value
    # In a file and not an argument: it holds the vocabulary, and every worker reads it once.
    path = os.path.join(job.directory, 'job.pickle')
    with shards.atomic_file(path) as file:
      file.write(pickle.dumps(job))
    futures: list[concurrent.futures.Future[shards.ShardInfo]] = []

    def submit(index: int, unit: Unit, key: str) -> 'concurrent.futures.Future[shards.ShardInfo]':
      assert self._workers is not None
      futures.append(self._workers.submit(_work, path, file.hash.hexdigest(), index, unit, key))
      return futures[-1]

    try:
      yield submit, lambda: counter.value - before
    except concurrent.futures.process.BrokenProcessPool:
      raise RuntimeError(f'a process preparing {job.task.name!r} died (out of memory?); run again '
                         f'to go on, perhaps with fewer processes') from None
    except KeyboardInterrupt:
      # Shards are whole or absent, so nothing is lost by not waiting for those under way.
      for process in list(self._workers._processes.values()):
        process.kill()
      raise
    finally:
      for future in futures:
        future.cancel()
      concurrent.futures.wait(futures)


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
  """What a worker process counts with, and the job it works on."""

  counter: Any = None
  identity: str = ''
  worker: _Worker


def _start(counter: Any) -> None:
  # Ctrl-C reaches the parent, which cancels; and no worker outlives a parent that was killed.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  parent = multiprocessing.parent_process()
  assert parent is not None

  def watch() -> None:
    parent.join()
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()
  _Process.counter = counter


def _work(path: str, identity: str, index: int, unit: Unit, key: str) -> shards.ShardInfo:
  if _Process.identity != identity:
    with open(path, 'rb') as file:
      _Process.worker = _Worker(pickle.load(file), _Process.counter)
    _Process.identity = identity
  return _Process.worker.shard(index, unit, key)


def _skipped_file(directory: str, index: int) -> str:
  return os.path.join(directory, f'shard-{index:05d}.skipped.json')
