"""What a run leaves while it trains: metric records, progress, and how fast it was."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from t5x_like import hardware, metrics, progress
from t5x_like.hooks import Run
from t5x_like.state import Model, Structure


class Outputs:
  """Metric writers, progress, and what speed means for this run."""

  def __init__(self, *, model: Model, structure: Structure, loader: Any, length: int, workdir: str,
               start: int, steps: int, writers: Sequence[str],
               productive: Callable[[], float]):
    """Opens the writers.

    Args:
      model: asked for its FLOPs per token, if it knows them.
      structure: the model's.
      loader: the training data, for hooks.
      length: tokens per row.
      workdir: the run's directory.
      start: updates done before this attempt.
      steps: updates of the whole run.
      writers: kinds of metric records; see `metrics.open_writers`.
      productive: productive seconds of this attempt so far.
    """
    main = jax.process_index() == 0
    self.writer = metrics.open_writers(workdir, step=start, kinds=writers,
                                       process_index=jax.process_index())
    self.progress = progress.Progress(steps, start=start, mode='auto' if main else 'off',
                                      productive=productive)
    self.run = Run(model, structure, loader, workdir, steps, self.writer.write,
                   self.progress.message)
    self.devices = structure.mesh.size
    cost = getattr(model, 'flops_per_token', None)
    self.flops_per_token = cost(length) if cost else None
    self.dtype = getattr(getattr(model, 'config', None), 'dtype', 'float32')
    self.peak = None
    self.speed = metrics.Throughput()

  def find_peak(self) -> None:
    """Finds what MFU is relative to; where that is measured, nothing else may be running."""
    if self.flops_per_token and jax.process_index() == 0:
      self.peak = hardware.peak_flops(dtype='float32' if self.dtype == 'float32' else 'bfloat16')
      self.progress.message(hardware.mfu_text(
          flops_per_token=self.flops_per_token, peak=self.peak, devices=self.devices))

  def ready(self, step: int, values: dict[str, float], *, log: bool) -> None:
    """Takes the metrics of an update whose result has arrived.

    Args:
      step: updates done.
      values: this update's metrics.
      log: whether this update is recorded.
    """
    self.speed.add(step, tokens=int(values['tokens']), ready=time.perf_counter())
    speed = {}
    if self.speed.steps:
      speed['tokens_per_second'] = self.speed.tokens_per_second
      if self.peak is not None and self.flops_per_token:
        speed['mfu'] = hardware.mfu(self.speed.tokens_per_second, peak=self.peak,
                                    flops_per_token=self.flops_per_token, devices=self.devices)
    if log:
      self.writer.write(step, {**values, **speed})
    self.progress.update(step, {'loss': values['loss'], **speed})

  def __enter__(self) -> 'Outputs':
    return self

  def __exit__(self, *unused: object) -> None:
    self.progress.close()
    self.writer.close()
