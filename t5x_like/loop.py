"""The loop itself: the metrics of an update are read while the next one runs."""

import base64
import contextlib
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import jax

from t5x_like import checkpoints, ledger
from t5x_like import step as step_lib
from t5x_like.data import prefetch
from t5x_like.hooks import Hook
from t5x_like.outputs import Outputs


class Loop:
  """Updates, and between them hooks and checkpoints."""

  def __init__(self, *, compiling: futures.Future, loader: step_lib.Loader,
               shapes: Mapping[str, jax.ShapeDtypeStruct], extra: Mapping[str, Any],
               outputs: Outputs, book: ledger.Ledger,
               checkpointer: checkpoints.Checkpointer | None, hooks: Sequence[Hook],
               log_every: int):
    """Takes the parts of a run.

    Args:
      compiling: its result is the compiled step.
      loader: the training data.
      shapes: of a batch.
      extra: JSON values that every checkpoint carries.
      outputs: takes metrics and messages.
      book: accounts the time.
      checkpointer: None saves nothing.
      hooks: called after updates.
      log_every: updates between metric records.
    """
    self.compiling, self.loader, self.shapes, self.extra = compiling, loader, shapes, extra
    self.outputs, self.book, self.checkpointer = outputs, book, checkpointer
    self.hooks, self.log_every = hooks, log_every
    self.stop = threading.Event()
    self.last: dict[str, float] = {}

  def run(self, train_state: Any, start: int, steps: int) -> tuple[Any, dict[str, float]]:
    """Runs updates start + 1 ... steps; returns the final state and the last metrics."""
    book = self.book
    # A loader with a state of its own must not run ahead of its checkpoint.
    depth = 0 if hasattr(self.loader, 'state') else 2
    put = lambda step: step_lib.place(self.loader, step, self.shapes)
    with _on_sigterm(self.stop), prefetch.prefetch(put, start, steps, depth=depth) as batches:
      compiled = None
      pending: tuple[int, Mapping[str, jax.Array]] | None = None
      for step in range(start, steps):
        if compiled is None:
          with book.phase('compile'):
            compiled = self.compiling.result()
            self.outputs.find_peak()
        with book.phase('data'):
          batch = next(batches)
        with book.phase('productive'):
          train_state, found = compiled(train_state, batch)
          if pending is not None:
            self._read(*pending)
        pending = (step + 1, found)
        last = step + 1 == steps or self.stop.is_set()
        if last or self._interrupts(step + 1):
          with book.phase('productive'):
            self._read(*pending)
          pending = None
          self._between(step + 1, train_state, last=step + 1 == steps)
        if self.stop.is_set():
          break
    if self.checkpointer is not None:
      with book.phase('checkpoint'):
        self._save(int(train_state['step']), train_state, force=True)
        self.checkpointer.wait()
    return train_state, self.last

  def _interrupts(self, step: int) -> bool:
    save = self.checkpointer is not None and step % self.checkpointer.every == 0
    return save or any(hook.due(step, last=False) for hook in self.hooks)

  def _between(self, step: int, train_state: Any, *, last: bool) -> None:
    # Hooks come first: a checkpoint then implies that what belongs to its update was recorded.
    for hook in self.hooks:
      if hook.due(step, last=last):
        with self.book.phase('evaluation'):
          hook(self.outputs.run, step, train_state)
    if self.checkpointer is not None and not last and step % self.checkpointer.every == 0:
      with self.book.phase('checkpoint'):
        self._save(step, train_state, force=False)
    self.outputs.speed.restart(at=time.perf_counter())

  def _save(self, step: int, train_state: Any, *, force: bool) -> None:
    assert self.checkpointer is not None
    extra = dict(self.extra)
    if hasattr(self.loader, 'state'):
      extra['loader_state'] = base64.b64encode(self.loader.state()).decode()  # pyright: ignore
    self.checkpointer.save(step, train_state, extra=extra, force=force)

  def _read(self, step: int, found: Mapping[str, jax.Array]) -> None:
    values = {name: float(x) for name, x in jax.device_get(dict(found)).items()}
    self.book.step(step)
    self.last = values
    if values['loss'] != values['loss'] or abs(values['loss']) == float('inf'):
      self.outputs.writer.write(step, values)
      raise FloatingPointError(
          f'the loss of update {step} is {values["loss"]}; its data: python -m t5x_like.inspect '
          f'--step {step - 1}; lower the learning rate or resume from an earlier checkpoint')
    self.outputs.ready(step, values, log=step % self.log_every == 0 or step == 1)


@contextlib.contextmanager
def _on_sigterm(stop: threading.Event) -> Iterator[None]:
  """Turns SIGTERM into a flag the loop reads after each update."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  previous = signal.signal(signal.SIGTERM, lambda *unused: stop.set())
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, previous)
