"""The training step alone, and the loop around it, measured turn by turn."""

import dataclasses
import functools
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from experiments.bench import machine, stores
from experiments.bench import report as report_lib
from partitioning import rules as rules_lib
from t5x_like import config, losses, train
from t5x_like import state as state_lib
from t5x_like import step as step_lib
from t5x_like.data import loader as loader_lib
from t5x_like.hooks import Run

_SOURCE = 'bench'


@dataclasses.dataclass(frozen=True)
class Parts:
  """What gin builds of a run: the model, and how it is trained."""

  model: Any
  optimizer: optax.GradientTransformation
  mesh: Mesh
  rules: rules_lib.Rules


def gather(*, model: Any, optimizer: optax.GradientTransformation, mesh: Mesh,
           rules: rules_lib.Rules) -> Parts:
  """Returns what gin files bind, so that the benchmark measures what a run would use."""
  return Parts(model, optimizer, mesh, rules)


def load(settings: report_lib.Settings, *, dtype: str) -> Parts:
  """Builds the parts from the gin files of a run.

  Args:
    settings: which model.
    dtype: its compute dtype.
  """
  here = 'experiments.bench.speed.gather'
  config.load(
    [f'gin/models/{settings.model}.gin', 'gin/optim/adamw.gin', 'gin/mesh/data.gin'],
    [f'VOCAB_SIZE = {settings.vocab}', 'TRAIN_STEPS = 1000',
     f'config.DecoderConfig.dtype = "{dtype}"', f'{here}.model = %MODEL',
     f'{here}.optimizer = %OPTIMIZER', f'{here}.mesh = %MESH', f'{here}.rules = %RULES'],
    modules=['experiments.bench.speed'])
  return config.call('experiments.bench.speed.gather')


def open_loader(store_dir: str, settings: report_lib.Settings, *, steps: int) -> Any:
  """Writes a store that lasts for some updates and opens the loader of a run on it."""
  tokens = max(steps, 10) * settings.batch_size * settings.length
  stores.write(store_dir, source=_SOURCE, tokens=min(tokens, 5_000_000), vocab=settings.vocab)
  return loader_lib.Loader(sources=_SOURCE, store_dir=store_dir, batch_size=settings.batch_size,
                           length=settings.length, seed=0)


class Bare:
  """The jitted train step and nothing else, always on the same batch, already on the device.

  Args:
    parts: model and optimizer.
    loader: its first batch is used.
  """

  def __init__(self, parts: Parts, loader: step_lib.Loader):
    self.parts = parts
    structure = state_lib.describe(parts.model, parts.mesh, parts.rules)
    self.shapes = step_lib.batch_shapes(loader.spec, structure)
    made = step_lib.make(structure, parts.optimizer, losses.next_token, seed=0)
    abstract = state_lib.abstract(structure, parts.optimizer)
    start = time.perf_counter()
    self._step = step_lib.lower(made, structure, abstract, self.shapes).compile()
    self.compile_seconds = time.perf_counter() - start
    self._batch = step_lib.place(loader, 0, self.shapes)
    self._state = state_lib.initial(parts.model, structure, parts.optimizer, seed=0)

  def chain(self, steps: int) -> float:
    """Runs updates without waiting in between; returns seconds from first call to last result."""
    start = time.perf_counter()
    metrics: Mapping[str, jax.Array] = {}
    for _ in range(steps):
      self._state, metrics = self._step(self._state, self._batch)
    jax.block_until_ready((self._state, metrics))
    return time.perf_counter() - start

  def each(self, steps: int) -> list[float]:
    """Runs updates, waiting for each; returns the seconds of each."""
    return [self.chain(1) for _ in range(steps)]


@functools.cache
def compiled(settings: report_lib.Settings, *, dtype: str) -> Bare:
  """Returns the bare step, compiled once for all sections and warmed up."""
  with tempfile.TemporaryDirectory(prefix='bench-') as folder:
    bare = Bare(load(settings, dtype=dtype), open_loader(folder, settings, steps=10))
  bare.chain(settings.scaled(5, 1))
  return bare


def measure_step(report: report_lib.Report, settings: report_lib.Settings) -> None:
  """Adds the rows of the section 'step'."""
  report.section('step', about=f'{settings.model}, {settings.batch_size} x {settings.length} '
                               f'tokens, vocabulary {settings.vocab}; the jitted train step alone')
  for dtype in settings.dtypes:
    _step_rows(report, settings, dtype)


def _step_rows(report: report_lib.Report, settings: report_lib.Settings, dtype: str) -> None:
  short = machine.SHORT[dtype]
  report.progress(f'compiling the {dtype} step')
  bare = compiled(settings, dtype=dtype)
  shape = bare.parts.model.config
  if dtype == settings.dtypes[0]:
    report.add('FLOPs/token, 6 x matmul parameters', 6.0 * shape.matmul_params(),
               note=f'6 x {shape.matmul_params():,}')
    report.add('FLOPs/token, with causal attention', shape.flops_per_token(settings.length))
  report.add(f'{short} compile', bare.compile_seconds, 's')
  peak = machine.add_peak(report, settings, dtype=dtype, config=shape, when='before the step')
  report.progress(f'timing the {dtype} step')
  times = bare.each(settings.scaled(40, 3))
  peak = max(peak, machine.add_peak(report, settings, dtype=dtype, config=shape,
                                    when='after the step'))
  best, median = min(times), statistics.median(times)
  tokens = settings.batch_size * settings.length
  report.add(f'{short} step, best', 1e3 * best, 'ms', note=f'of {len(times)} after warm-up')
  report.add(f'{short} step, median', 1e3 * median, 'ms')
  report.add(f'{short} tokens/s, best step', tokens / best)
  report.add(f'{short} tokens/s, median step', tokens / median)
  for name, flops in (('6 x matmul parameters', 6.0 * shape.matmul_params()),
                      ('with attention', shape.flops_per_token(settings.length))):
    share = 100 * tokens * flops / peak
    report.add(f'{short} share of peak, {name}', share / median, '%',
               note=f'median step over the higher peak; best step {share / best:.1f} %')


class Turns:
  """A hook: after every few updates of the loop, as many bare steps, so that drift cancels.

  Its own calls lie outside what is timed of the loop. The loop has read every result when a hook
  is called, so both start and end with an idle device.

  Args:
    bare: the step alone.
    updates: per turn.
  """

  def __init__(self, bare: Bare, *, updates: int):
    self._bare, self._updates = bare, updates
    self._resumed: tuple[float, float] | None = None
    self.loop: list[float] = []
    self.alone: list[float] = []
    self.loop_cpu: list[float] = []
    self.alone_cpu: list[float] = []

  def due(self, step: int, *, last: bool) -> bool:
    """After every turn."""
    del last
    return step % self._updates == 0

  def __call__(self, run: Run, step: int, train_state: Mapping[str, Any]) -> None:
    """Ends a turn of the loop and takes one of the bare step."""
    del run, step, train_state
    at, cpu = _now()
    if self._resumed is not None:  # The first turn holds the compilation.
      self.loop.append(at - self._resumed[0])
      self.loop_cpu.append(cpu - self._resumed[1])
    self.alone.append(self._bare.chain(self._updates))
    self._resumed = _now()
    self.alone_cpu.append(self._resumed[1] - cpu)


def _now() -> tuple[float, float]:
  """Returns the clock and the CPU time of all threads, in seconds."""
  return time.perf_counter(), time.process_time()


def over_neighbours(turns: Sequence[float], alone: Sequence[float]) -> list[float]:
  """Returns each turn over the mean of the two around it, so that the machine's drift cancels.

  Args:
    turns: one measurement each.
    alone: one more, measured before, between and after them.
  """
  around = [(a + b) / 2 for a, b in itertools.pairwise(alone)]
  return [turn / mean for turn, mean in zip(turns, around, strict=True)]


def measure_loop(report: report_lib.Report, settings: report_lib.Settings) -> None:
  """Adds the rows of the section 'loop'."""
  report.section('loop', about='t5x_like.train.train around the same step, reading a token store, '
                               'writing metrics.jsonl; no checkpoints, no evaluation')
  updates, turns = settings.scaled(8, 2), settings.scaled(20, 2)
  with tempfile.TemporaryDirectory(prefix='bench-') as folder:
    loader = open_loader(folder, settings, steps=updates * (turns + 1))
    for dtype in settings.dtypes:
      _loop_rows(report, settings, loader, dtype=dtype, updates=updates, turns=turns,
                 workdir=os.path.join(folder, dtype))


def _loop_rows(report: report_lib.Report, settings: report_lib.Settings,
               loader: Any, *, dtype: str, updates: int, turns: int, workdir: str
               ) -> None:
  short = machine.SHORT[dtype]
  report.progress(f'compiling the {dtype} step, alone and in the loop')
  bare = compiled(settings, dtype=dtype)
  parts = bare.parts
  hook = Turns(bare, updates=updates)
  train.train(model=parts.model, loader=loader, optimizer=parts.optimizer, loss=losses.next_token,
              mesh=parts.mesh, rules=parts.rules, steps=updates * (turns + 1), workdir=workdir,
              hooks=[hook], writers=['jsonl'])
  ratios = over_neighbours(hook.loop, hook.alone)
  tokens = settings.batch_size * settings.length * updates
  report.add(f'{short} bare step in its turns, median', _per_step(hook.alone, updates), 'ms')
  report.add(f'{short} update of the loop, median', _per_step(hook.loop, updates), 'ms')
  report.add(f'{short} tokens/s of the loop', tokens / statistics.median(hook.loop))
  low, high = _quartiles(ratios)
  report.add(f'{short} overhead of the loop', 100 * (statistics.median(ratios) - 1), '%',
             note=f'median of {len(ratios)} turns of {updates} updates each; '
                  f'middle half {100 * (low - 1):+.1f} to {100 * (high - 1):+.1f} %')
  spent = statistics.median(over_neighbours(hook.loop_cpu, hook.alone_cpu))
  report.add(f'{short} overhead of the loop in CPU time', 100 * (spent - 1), '%',
             note='of all threads: what other work on the machine disturbs least')
  ready = []
  for step in range(settings.scaled(50, 5)):
    start = time.perf_counter()
    jax.block_until_ready(step_lib.place(loader, step, bare.shapes))
    ready.append(time.perf_counter() - start)
  report.add(f'{short} batch read and placed', 1e3 * statistics.median(ready), 'ms',
             note='done in a thread, beside the step')


def _per_step(seconds: Sequence[float], steps: int) -> float:
  return 1e3 * statistics.median(seconds) / steps


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
  low, _, high = statistics.quantiles(values, n=4, method='inclusive')
  return low, high
