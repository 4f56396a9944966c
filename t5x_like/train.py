"""Pretrains a model: `python -m t5x_like.train --gin_file=gin/runs/pretrain.gin ...`."""

import sys

from t5x_like import config

if __name__ == '__main__':  # Before the slow imports: flags are answered at once.
  sys.exit(config.run('t5x_like.train.train'))

import base64
import concurrent.futures as futures
import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import optax
from jax.sharding import Mesh

from partitioning import rules as rules_lib
from t5x_like import checkpoints, hardware, ledger, limits, losses, metrics, preview, progress
from t5x_like import state as state_lib
from t5x_like import step as step_lib
from t5x_like.data import prefetch
from t5x_like.hooks import Hook, Run

STOPPED = 143  # exit status of a run stopped by SIGTERM, as a shell would report it


def train(*, model: state_lib.Model, loader: step_lib.Loader,
          optimizer: optax.GradientTransformation, loss: losses.Loss, mesh: Mesh,
          rules: rules_lib.Rules, steps: int, workdir: str,
          checkpointer: checkpoints.Checkpointer | None = None, hooks: Sequence[Hook] = (),
          seed: int = 0, microbatches: int = 1, ema: float | None = None,
          initial: str | None = None, data_change: Literal['refuse', 'allow'] = 'refuse',
          log_every: int = 10, writers: Sequence[Literal['jsonl', 'tensorboard', 'wandb']] =
          ('jsonl', 'tensorboard')) -> dict[str, Any]:
  """Trains until `steps` updates are done, resuming from the newest good checkpoint.

  Args:
    model: builds the module; see `t5x_like.state.Model`.
    loader: `batch(step)`; see `t5x_like.step.Loader`.
    optimizer: gradients to updates.
    loss: (module, batch) to (sum, weight, metrics).
    mesh: the device mesh.
    rules: logical axes to mesh axes.
    steps: updates of the whole run, those before a restart included.
    workdir: the run's directory: metrics, ledger, configuration, model info.
    checkpointer: cadence and place of checkpoints; None saves nothing.
    hooks: called after updates; see `t5x_like.hooks.Hook`.
    seed: of initialisation and dropout.
    microbatches: parts of a batch computed one after the other.
    ema: decay of an average of the parameters kept for evaluation, in (0, 1).
    initial: directory of checkpoints whose newest weights a fresh run starts from.
    data_change: whether a resumed run may read other data than its checkpoint was trained on.
    log_every: updates between metric records.
    writers: which metric records to keep.
  Returns:
    {'step', 'loss', 'metrics' of the last update, 'ledger' summary}.
  Raises:
    ValueError: a setting does not fit another; nothing has been compiled then.
    FloatingPointError: the loss is no longer finite.
    SystemExit: SIGTERM arrived; the state has been saved.
  """
  if steps < 1 or log_every < 1 or microbatches < 1:
    raise ValueError(f'steps={steps}, log_every={log_every} and microbatches={microbatches} must '
                     f'be at least 1')
  if ema is not None and not 0 < ema < 1:
    raise ValueError(f'ema={ema} must be in (0, 1)')
  plan = _Plan(model, loader, optimizer, loss, mesh, rules, seed=seed, microbatches=microbatches,
               ema=ema)
  os.makedirs(workdir, exist_ok=True)
  book = ledger.Ledger(
      os.path.join(workdir, 'ledger.jsonl') if jax.process_index() == 0 else None,
      started=ledger.process_start())
  with book, checkpointer or contextlib.nullcontext(), _background() as background:
    # The step compiles while the state is drawn or restored.
    compiling = background.submit(lambda: plan.lower().compile())
    start, train_state = _start(plan, checkpointer, initial, data_change)
    book.resume(start)
    if jax.process_index() == 0:
      config.record(workdir)
      preview.write_model_info(plan.structure, workdir)
    outputs = _Outputs(plan, workdir, steps, start, book, writers)
    with outputs:
      loop = _Loop(plan, compiling, outputs, checkpointer, hooks, log_every)
      train_state, last = loop.run(train_state, start, steps, book)
    summary = book.summary()
  done = int(train_state['step'])
  if loop.stop.is_set() and done < steps:
    print(f'stopped by SIGTERM after update {done}; the same command continues from there',
          file=sys.stderr, flush=True)
    raise SystemExit(STOPPED)
  return {'step': done, 'loss': last.get('loss'), 'metrics': last, 'ledger': summary.as_dict()}


def _background() -> futures.ThreadPoolExecutor:
  return futures.ThreadPoolExecutor(1, thread_name_prefix='compile')


class _Plan:
  """A run before it starts: the step, its shapes, and where everything lives."""

  def __init__(self, model, loader, optimizer, loss, mesh, rules, *, seed, microbatches, ema):
    self.model, self.loader, self.optimizer, self.seed, self.ema = (
        model, loader, optimizer, seed, ema)
    self.structure = state_lib.describe(model, mesh, rules)
    vocab, needed = getattr(model, 'vocab', None), getattr(loader, 'vocab_size', None)
    if vocab is not None and needed is not None and vocab < needed:
      raise ValueError(f'the data has token ids up to {needed - 1} but the model has vocab='
                       f'{vocab}; set the model\'s vocab to at least {needed}')
    self.shapes = step_lib.batch_shapes(loader.spec, self.structure, microbatches=microbatches)
    self.abstract = state_lib.abstract(self.structure, optimizer, ema=ema is not None)
    self.train_step = step_lib.make(self.structure, optimizer, loss, seed=seed,
                                    microbatches=microbatches, ema=ema)
    first = next(iter(self.shapes.values()))
    self.length = first.shape[1] if len(first.shape) > 1 else 1
    for line in limits.notes(model, length=self.length) + rules_lib.replicated_report(
        {row['path']: (row['bytes'], row['spec']) for row in self.structure.rows()}, rules, mesh):
      print(f'note: {line}', file=sys.stderr)

  def lower(self):
    return step_lib.lower(self.train_step, self.structure, self.abstract, self.shapes)


def _start(plan: _Plan, checkpointer: checkpoints.Checkpointer | None, initial: str | None,
           data_change: str) -> tuple[int, Any]:
  """The state to go on from and the updates it has had."""
  found = None if checkpointer is None else checkpointer.restore(plan.abstract)
  if found is not None:
    start, train_state, extra = found
    if extra.get('data') != plan.loader.fingerprint and data_change == 'refuse':
      raise ValueError(
          f'the checkpoint at update {start} was trained on other data or another order '
          f'({str(extra.get("data"))[:12]}, now {plan.loader.fingerprint[:12]}); start a new run '
          f'from its weights with train.initial, or set train.data_change = \'allow\'')
    if 'loader_state' in extra:
      plan.loader.restore(base64.b64decode(extra['loader_state']))  # pyright: ignore
    return start, train_state
  train_state = state_lib.initial(plan.model, plan.structure, plan.optimizer, seed=plan.seed,
                                  ema=plan.ema is not None)
  if initial is not None:
    params = checkpoints.load_params(initial, plan.structure.shapes)
    train_state['params'] = params
    if plan.ema is not None:
      train_state['ema'] = jax.tree.map(lambda x: x.copy(), params)
  return 0, train_state


class _Outputs:
  """Metric writers, progress, and what speed means for this run."""

  def __init__(self, plan: _Plan, workdir: str, steps: int, start: int, book: ledger.Ledger,
               writers: Sequence[str]):
    main = jax.process_index() == 0
    self.writer = metrics.open_writers(workdir, step=start, kinds=writers,
                                       process_index=jax.process_index())
    self.progress = progress.Progress(steps, start=start, mode='auto' if main else 'off',
                                      productive=book.productive_seconds)
    self.run = Run(plan.model, plan.structure, plan.loader, workdir, steps, self.writer.write,
                   self.progress.message)
    self.devices = plan.structure.mesh.size
    cost = getattr(plan.model, 'flops_per_token', None)
    self.flops_per_token = cost(plan.length) if cost else None
    self.dtype = getattr(getattr(plan.model, 'config', None), 'dtype', 'float32')
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

  def __enter__(self) -> '_Outputs':
    return self

  def __exit__(self, *unused: object) -> None:
    self.progress.close()
    self.writer.close()


class _Loop:
  """The loop itself: the metrics of an update are read while the next one runs."""

  def __init__(self, plan: _Plan, compiling: futures.Future, outputs: _Outputs,
               checkpointer: checkpoints.Checkpointer | None, hooks: Sequence[Hook],
               log_every: int):
    self.plan, self.outputs, self.checkpointer = plan, outputs, checkpointer
    self.compiling = compiling
    self.hooks, self.log_every = hooks, log_every
    self.stop = threading.Event()
    self.last: dict[str, float] = {}

  def run(self, train_state: Any, start: int, steps: int, book: ledger.Ledger
          ) -> tuple[Any, dict[str, float]]:
    """Runs updates start + 1 ... steps; returns the final state and the last metrics."""
    plan = self.plan
    # A loader with a state of its own must not run ahead of its checkpoint.
    depth = 0 if hasattr(plan.loader, 'state') else 2
    put = lambda step: step_lib.place(plan.loader, step, plan.shapes)
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
            self._read(*pending, book=book)
        pending = (step + 1, found)
        last = step + 1 == steps or self.stop.is_set()
        if last or self._interrupts(step + 1):
          with book.phase('productive'):
            self._read(*pending, book=book)
          pending = None
          self._between(step + 1, train_state, book, last=step + 1 == steps)
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

  def _between(self, step: int, train_state: Any, book: ledger.Ledger, *, last: bool) -> None:
    # Hooks come first: a checkpoint then implies that what belongs to its update was recorded.
    for hook in self.hooks:
      if hook.due(step, last=last):
        with book.phase('evaluation'):
          hook(self.outputs.run, step, train_state)
    if self.checkpointer is not None and not last and step % self.checkpointer.every == 0:
      with book.phase('checkpoint'):
        self._save(step, train_state, force=False)
    self.outputs.speed.restart(at=time.perf_counter())

  def _save(self, step: int, train_state: Any, *, force: bool) -> None:
    assert self.checkpointer is not None
    extra = {'data': self.plan.loader.fingerprint, 'seed': self.plan.seed}
    if hasattr(self.plan.loader, 'state'):
      extra['loader_state'] = base64.b64encode(self.plan.loader.state()).decode()  # pyright: ignore
    self.checkpointer.save(step, train_state, extra=extra, force=force)

  def _read(self, step: int, found: Mapping[str, jax.Array], *, book: ledger.Ledger) -> None:
    values = {name: float(x) for name, x in jax.device_get(dict(found)).items()}
    book.step(step)
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


def dry_run(**settings: Any) -> dict[str, Any]:
  """Builds everything abstractly and prints what a run would be; see `preview.show`.

  Args:
    **settings: those of `train`.
  Returns:
    The numbers printed.
  """
  plan = _Plan(settings['model'], settings['loader'], settings['optimizer'], settings['loss'],
               settings['mesh'], settings['rules'], seed=settings.get('seed', 0),
               microbatches=settings.get('microbatches', 1), ema=settings.get('ema'))
  return preview.show(plan.structure, plan.abstract, plan.shapes, plan.lower, model=plan.model,
                      loader=plan.loader, steps=settings['steps'])
