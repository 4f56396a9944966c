"""The loop itself: the metrics of an update are read while the next one runs."""

import base64
import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
from jax.experimental import multihost_utils

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
        last = self._stops(step + 1) or step + 1 == steps
        if last or self._interrupts(step + 1):
          with book.phase('productive'):
            self._read(*pending)
          pending = None
          self._between(step + 1, train_state, last=step + 1 == steps)
        if self.stop.is_set():
          break
    if self.checkpointer is not None:
      with book.phase('checkpoint'):
        self.checkpointer.finish(int(train_state['step']), train_state, extra=self._extra())
    return train_state, self.last

  def _stops(self, step: int) -> bool:
    """Whether SIGTERM ends the run here; several processes agree on the update."""
    if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
      self.stop.set()
    return self.stop.is_set()

  def _interrupts(self, step: int) -> bool:
    save = self.checkpointer is not None and step % self.checkpointer.every == 0
    return save or any(hook.due(step, last=False) for hook in self.hooks)

  def _between(self, step: int, train_state: Any, *, last: bool) -> None:
    with self.book.phase('productive'):
      self._check_params(step, train_state['params'])
    # Hooks come first: a checkpoint then implies that what belongs to its update was recorded.
    for hook in self.hooks:
      if hook.due(step, last=last):
        try:
          with self.book.phase('evaluation'):
            hook(self.outputs.run, step, train_state)
        except Exception:
          self._rescue(step, train_state, name=type(hook).__name__)
          raise
    if self.checkpointer is not None and not last and step % self.checkpointer.every == 0:
      with self.book.phase('checkpoint'):
        self.checkpointer.save(step, train_state, extra=self._extra())
    self.outputs.speed.restart(at=time.perf_counter())

  def _rescue(self, step: int, train_state: Any, *, name: str) -> None:
    """Keeps the updates done before a hook failed; the hook's error is the one to be shown."""
    if self.checkpointer is None:
      return
    try:
      with self.book.phase('checkpoint'):
        self.checkpointer.finish(step, train_state, extra=self._extra())
      self.outputs.run.message(
          f'{name} failed after update {step}; the state is saved, and the same command goes on '
          f'from it without what {name} would have recorded')
    except Exception as error:
      self.outputs.run.message(f'{name} failed after update {step}, and then: {error}')

  def _extra(self) -> dict[str, Any]:
    extra = dict(self.extra)
    if hasattr(self.loader, 'state'):
      extra['loader_state'] = base64.b64encode(self.loader.state()).decode()  # pyright: ignore
    return extra

  def _read(self, step: int, found: Mapping[str, jax.Array]) -> None:
    values = {name: float(x) for name, x in jax.device_get(dict(found)).items()}
    self.book.step(step)
    self.last = values
    self._check(step, 'the loss of', values['loss'])
    self.outputs.ready(step, values, log=step % self.log_every == 0 or step == 1)

  def _check_params(self, step: int, params: Any) -> None:
    """Before hooks and saves: the loss is that of the parameters before the update."""
    self._check(step, 'the norm of the parameters after', float(step_lib.param_norm(params)))

  def _check(self, step: int, what: str, value: float) -> None:
    if math.isfinite(value):
      return
    self.outputs.writer.write(step, self.last)
    raise FloatingPointError(
        f'{what} update {step} is {value} (its loss {self.last["loss"]}, its gradient norm '
        f'{self.last["grad_norm"]}), so its state is not saved; its data: python -m '
        f't5x_like.inspect --step {step - 1}; lower the learning rate, or resume from an '
        f'earlier checkpoint')


@contextlib.contextmanager
def _on_sigterm(stop: threading.Event) -> Iterator[None]:
  """Turns SIGTERM into a flag the loop reads after each update."""
  # Of several processes, JAX takes the signal, whichever it reaches, and tells the others.
  if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
    yield
    return
  previous = signal.signal(signal.SIGTERM, lambda *unused: stop.set())
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, previous)
