"""Pretrains a model: `python -m t5x_like.train --gin_file=gin/runs/pretrain.gin ...`."""

import sys

from t5x_like import config

if __name__ == '__main__':  # Before the slow imports: flags are answered at once.
  sys.exit(config.run('t5x_like.train.train'))

import contextlib
import os
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any, Literal, get_args

import jax
import optax
from jax.sharding import Mesh

from partitioning import rules as rules_lib
from t5x_like import (
  checkpoints,
  checks,
  ledger,
  limits,
  locks,
  losses,
  preview,
  provenance,
  resume,
)
from t5x_like import state as state_lib
from t5x_like import step as step_lib
from t5x_like.hooks import Hook
from t5x_like.loop import Loop
from t5x_like.outputs import Outputs

STOPPED = 143  # exit status of a run stopped by SIGTERM, as a shell would report it
Change = Literal['refuse', 'allow']


def train(*, model: state_lib.Model, loader: step_lib.Loader,
          optimizer: optax.GradientTransformation, loss: losses.Loss, mesh: Mesh,
          rules: rules_lib.Rules, steps: int, workdir: str,
          checkpointer: checkpoints.Checkpointer | None = None, hooks: Sequence[Hook] = (),
          seed: int = 0, microbatches: int = 1, ema: float | None = None,
          initial: str | Callable[[Any], Any] | None = None, data_change: Change = 'refuse',
          model_change: Change = 'refuse', log_every: int = 10,
          writers: Sequence[Literal['jsonl', 'tensorboard', 'wandb']] = ('jsonl', 'tensorboard')
          ) -> dict[str, Any]:
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
    initial: directory of checkpoints whose newest weights a fresh run starts from, or what fills
      its parameters in, such as `t5x_like.partial.Partial`.
    data_change: whether a resumed run may read other data than its checkpoint was trained on.
    model_change: whether a resumed run's model may compute something else from equal shapes.
    log_every: updates between metric records.
    writers: which metric records to keep.
  Returns:
    {'step', 'loss', 'metrics' of the last update, 'ledger' summary}.
  Raises:
    ValueError: a setting does not fit another; nothing has been compiled then.
    FloatingPointError: the loss or the parameters are no longer finite; such a state is not saved.
    OSError: the last state could not be saved.
    SystemExit: SIGTERM arrived; the state has been saved.
  """
  _check(model=model, loader=loader, steps=steps, log_every=log_every, microbatches=microbatches,
         ema=ema, hooks=hooks, data_change=data_change, model_change=model_change, workdir=workdir)
  plan = _Plan(model, loader, optimizer, loss, mesh, rules, seed=seed, microbatches=microbatches,
               ema=ema)
  workdir = os.path.expanduser(workdir)
  begin = lambda: _start(plan, checkpointer, initial, data_change, model_change)
  with contextlib.ExitStack() as held:
    for folder in _folders(workdir, checkpointer) if jax.process_index() == 0 else ():
      held.enter_context(locks.alone(folder))
    held.enter_context(checkpointer or contextlib.nullcontext())
    if checkpointer is not None and max(checkpointer.steps(), default=0) >= steps:
      start, _ = begin()
      if start >= steps:  # Unless the newest was damaged.
        return _nothing_to_do(start, steps, workdir)
    book = held.enter_context(ledger.Ledger(
        os.path.join(workdir, 'ledger.jsonl') if jax.process_index() == 0 else None,
        started=ledger.process_start()))
    background = held.enter_context(_background())
    # The step compiles while the state is drawn or restored.
    compiling = background.submit(lambda: plan.lower().compile())
    start, train_state = begin()
    book.resume(start)
    if jax.process_index() == 0:
      config.record(workdir)
      provenance.record(workdir, plan.loader)
      preview.write_model_info(plan.structure, workdir)
    with Outputs(model=model, structure=plan.structure, loader=loader, length=plan.length,
                 workdir=workdir, start=start, steps=steps, writers=writers,
                 productive=book.productive_seconds) as outputs:
      loop = Loop(compiling=compiling, loader=loader, shapes=plan.shapes, extra=plan.extra,
                  outputs=outputs, book=book, checkpointer=checkpointer, hooks=hooks,
                  log_every=log_every)
      train_state, last = loop.run(train_state, start, steps)
    summary = book.summary()
  done = int(train_state['step'])
  if loop.stop.is_set() and done < steps:
    print(f'stopped by SIGTERM after update {done}; the same command continues from there',
          file=sys.stderr, flush=True)
    raise SystemExit(STOPPED)
  return {'step': done, 'loss': last.get('loss'), 'metrics': last, 'ledger': summary.as_dict()}


def _check(*, model: state_lib.Model, loader: step_lib.Loader, steps: int,
           hooks: Sequence[Hook] = (), microbatches: int = 1, ema: float | None = None,
           data_change: str = 'refuse', model_change: str = 'refuse', log_every: int = 10,
           workdir: str = '', **unused: Any) -> None:
  """Refuses what can be seen from the settings alone."""
  if steps < 1 or log_every < 1 or microbatches < 1:
    raise ValueError(f'steps={steps}, log_every={log_every} and microbatches={microbatches} must '
                     f'be at least 1')
  if '://' in str(workdir):
    raise ValueError(f'workdir={workdir!r} is an address, but metrics, ledger and lock are files: '
                     f'mount it and give the folder (MODEL_DIR)')
  if ema is not None and not 0 < ema < 1:
    raise ValueError(f'ema={ema} must be in (0, 1)')
  for name, value in (('data_change', data_change), ('model_change', model_change)):
    if value not in get_args(Change):
      raise ValueError(f"{name}={value!r} is unknown; allowed: 'refuse', 'allow'")
  checks.check_distinct({'hooks': list(hooks)})
  for hook in hooks:
    if (check := getattr(hook, 'check', None)) is not None:
      check(model=model, loader=loader)


def _folders(workdir: str, checkpointer: checkpoints.Checkpointer | None) -> list[str]:
  """The local folders that this run alone may write to."""
  folders = [os.path.realpath(workdir)]
  if checkpointer is not None and '://' not in (saved := str(checkpointer.directory)):
    folders.append(os.path.realpath(saved))
  return sorted(set(folders))


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
    self.extra = {'data': loader.fingerprint, 'seed': seed, 'model': resume.definition(model)}
    first = next(iter(self.shapes.values()))
    self.length = first.shape[1] if len(first.shape) > 1 else 1
    for line in limits.notes(model, length=self.length) + rules_lib.replicated_report(
        {row['path']: (row['bytes'], row['spec']) for row in self.structure.rows()}, rules, mesh):
      print(f'note: {line}', file=sys.stderr)

  def lower(self):
    return step_lib.lower(self.train_step, self.structure, self.abstract, self.shapes)


def _nothing_to_do(start: int, steps: int, workdir: str) -> dict[str, Any]:
  print(f'already at update {start} of {steps}: nothing to do; raise TRAIN_STEPS to train on',
        file=sys.stderr)
  past = ledger.account(ledger.load(os.path.join(workdir, 'ledger.jsonl')))
  return {'step': start, 'loss': None, 'metrics': {}, 'ledger': past.as_dict()}


def _start(plan: _Plan, checkpointer: checkpoints.Checkpointer | None,
           initial: str | Callable[[Any], Any] | None, data_change: str,
           model_change: str) -> tuple[int, Any]:
  """The updates done and the state to go on from."""
  if checkpointer is not None:
    found = resume.newest(checkpointer, plan.abstract, extra=plan.extra, loader=plan.loader,
                          data_change=data_change, model_change=model_change)
    if found is not None:
      return found
  train_state = state_lib.initial(plan.model, plan.structure, plan.optimizer, seed=plan.seed,
                                  ema=plan.ema is not None)
  if initial is not None:
    params = (checkpoints.load_params(initial, plan.structure.shapes) if isinstance(initial, str)
              else initial(train_state['params']))
    train_state['params'] = params
    if plan.ema is not None:
      train_state['ema'] = jax.tree.map(lambda x: x.copy(), params)
  return 0, train_state


def dry_run(**settings: Any) -> dict[str, Any]:
  """Builds everything abstractly and prints what a run would be; see `preview.show`.

  Args:
    **settings: those of `train`.
  Returns:
    The numbers printed.
  """
  _check(**settings)
  plan = _Plan(settings['model'], settings['loader'], settings['optimizer'], settings['loss'],
               settings['mesh'], settings['rules'], seed=settings.get('seed', 0),
               microbatches=settings.get('microbatches', 1), ema=settings.get('ema'))
  return preview.show(plan.structure, plan.abstract, plan.shapes, plan.lower, model=plan.model,
                      loader=plan.loader, steps=settings['steps'])
