"""Batches made ahead of the loop, in a thread, so that the device does not wait for them."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar('T')


class Prefetch(Iterator[T], Generic[T]):
  """Iterator over make(start), make(start + 1), ...; use it in a `with`, or close it."""

  def __init__(self, make: Callable[[int], T], *, start: int, stop: int | None, depth: int):
    self._make, self._step, self._stop = make, start, stop
    # Buffered items and the one being made add up to depth.
    self._queue: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(max(depth - 1, 1))
    self._closed = threading.Event()
    self._finished = False
    self._thread: threading.Thread | None = None
    if depth > 0:
      self._thread = threading.Thread(target=self._run, daemon=True, name='prefetch')
      self._thread.start()

  def __next__(self) -> T:
    if self._finished or self._closed.is_set():
      raise StopIteration
    value, error = self._one() if self._thread is None else self._queue.get()
    if error is not None:
      self._finished = True
      raise error
    return value

  def __iter__(self) -> 'Prefetch[T]':
    return self

  def __enter__(self) -> 'Prefetch[T]':
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def close(self) -> None:
    """Stops the thread and drops what it has made; may be called again."""
    self._closed.set()
    while self._thread is not None and self._thread.is_alive():
      try:
        self._queue.get_nowait()
      except queue.Empty:
        self._thread.join(timeout=0.01)

  def _one(self) -> tuple[Any, BaseException | None]:
    if self._stop is not None and self._step >= self._stop:
      return None, StopIteration()
    try:
      value = self._make(self._step)
    except BaseException as error:  # It is the consumer's to handle, whatever it is.
      return None, error
    self._step += 1
    return value, None

  def _run(self) -> None:
    while not self._closed.is_set():
      item = self._one()
      while not self._closed.is_set():
        try:
          self._queue.put(item, timeout=0.1)
          break
        except queue.Full:
          continue
      if item[1] is not None:
        return


def prefetch(make: Callable[[int], T], start: int, stop: int | None = None, *, depth: int = 2
             ) -> Prefetch[T]:
  """Makes the batches of steps ahead of the consumer, in a thread.

  Args:
    make: gives the batch of a step, for example reads it and places it on devices.
    start: first step.
    stop: step to end before; None to go on for ever.
    depth: most batches made ahead, >= 0; 0 makes each when it is asked for, without a thread.

  Returns:
    Iterator over make(start), make(start + 1), ... What goes wrong in the thread is raised where
    the batch it belongs to would have come. Close it, or use it in a `with`, to stop the thread.

  Raises:
    ValueError: depth is negative.
  """
  if depth < 0:
    raise ValueError(f'depth must be 0 or more, got {depth}')
  return Prefetch(make, start=start, stop=stop, depth=depth)
