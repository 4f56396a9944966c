"""Where a run's numbers go, and how its speed is counted."""

import collections
import contextlib
import importlib
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from t5x_like import journal

Value = Any  # float | int | str | numpy or JAX scalar


class Writer(Protocol):
  """Takes the values of a step.

  A step counts completed updates: the values of the first update have step 1, and a state saved
  as step s has seen exactly the updates up to s.
  """

  def write(self, step: int, values: Mapping[str, Value]) -> None:
    """Records named scalars or texts of a step."""
    ...

  def flush(self) -> None:
    """Pushes what was written out of this process."""
    ...

  def close(self) -> None:
    """Flushes and releases; nothing may be written afterwards."""
    ...


def plain(value: Value) -> float | int | str:
  """Turns a scalar into the Python value that `json` writes so that it reads back exactly.

  A float32 becomes the shortest decimal that rounds to it, so that 0.1 is logged as 0.1.

  Args:
    value: Python, numpy or JAX scalar, or text.

  Returns:
    An equal (in the value's own precision) float, int or str.

  Raises:
    ValueError: if it is no scalar.
  """
  if isinstance(value, (str, float, int)) and not isinstance(value, np.generic):
    return value
  array = np.asarray(value)
  if array.ndim:
    raise ValueError(f'a metric is one number or text, but this has shape {array.shape}; '
                     'reduce it first, or write its parts under several names')
  if array.dtype == np.float32:
    return float(str(array[()]))
  item = array.item()
  return item if isinstance(item, (str, float, int)) else float(item)


class Jsonl:
  """Writes one JSON object per line: {"step": 7, "loss": 3.25}.

  A NaN or infinity is written as null, with its name in "nonfinite": {"loss": "nan"}, so that
  every line is valid JSON. Only lines the run will not write again are kept on opening: after a
  crash and a restart the file reads as if nothing had happened.

  Args:
    path: the file.
    step: the step the run goes on from; lines of later steps are dropped. 0 starts afresh.
  """

  def __init__(self, path: str, *, step: int = 0):
    # Values of the step resumed at (an evaluation after its save, say) may be written twice.
    self._written: set[tuple[int, tuple[str, ...]]] = set()
    self._step = step

    def keep(record: dict[str, Any]) -> bool:
      at = record.get('step', math.inf)
      if at == step:
        self._written.add((at, _names(record)))
      return at <= step

    self.dropped = journal.keep_only(path, keep)
    self._journal = journal.Journal(path)

  def write(self, step: int, values: Mapping[str, Value]) -> None:
    """Appends a line; it survives SIGKILL from here on.

    Args:
      step: completed updates.
      values: scalars or texts by name.
    """
    record: dict[str, Any] = {'step': int(step)}
    nonfinite = {}
    for name, value in values.items():
      value = plain(value)
      if isinstance(value, float) and not math.isfinite(value):
        nonfinite[name] = str(value)
        value = None
      record[name] = value
    if nonfinite:
      record['nonfinite'] = nonfinite
    if step <= self._step and (step, _names(record)) in self._written:
      return
    self._journal.append(record)

  def flush(self) -> None:
    """Tries again to write lines the disk refused."""
    self._journal.flush()

  def close(self) -> None:
    """Closes the file."""
    self._journal.close()


def _names(record: Mapping[str, Any]) -> tuple[str, ...]:
  return tuple(sorted(name for name in record if name not in ('step', 'nonfinite')))


def read_jsonl(path: str) -> list[dict[str, Any]]:
  """Reads what `Jsonl` wrote.

  Args:
    path: the file.

  Returns:
    One dict per line, with NaN and infinities as floats.

  Raises:
    ValueError: if the file is missing.
  """
  if not os.path.exists(path):
    raise ValueError(f'there are no metrics at {path}; is this the directory of a run that '
                     'trained?')
  records = []
  for record in journal.read(path):
    for name, text in record.pop('nonfinite', {}).items():
      record[name] = float(text)
    records.append(record)
  return records


def column(records: Iterable[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
  """Picks one metric.

  Args:
    records: as from `read_jsonl`.
    name: of the metric.

  Returns:
    (steps, values), of the records that have it.
  """
  pairs = [(r['step'], r[name]) for r in records if name in r]
  return [step for step, _ in pairs], [value for _, value in pairs]


def _optional(module: str, *, extra: str, purpose: str) -> Any:
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise ValueError(f'{purpose} needs the package {module!r}, which is not installed. Install '
                     f"it with: pip install 't5x_like[{extra}]', or leave this writer "
                     'out.') from error


@contextlib.contextmanager
def _without(module: str) -> Iterator[None]:
  """Keeps a package from being imported: tensorboardX takes torch along where it finds it (2 s,
  400 MB), for tensors that are never written here."""
  if module in sys.modules:
    yield
    return
  sys.modules[module] = None  # pyright: ignore[reportArgumentType]
  try:
    yield
  finally:
    del sys.modules[module]


class TensorBoard:
  """Writes TensorBoard event files through tensorboardX.

  Args:
    directory: of the event files.
    step: the step the run goes on from; TensorBoard hides later points of earlier attempts.
  """

  def __init__(self, directory: str, *, step: int = 0):
    with _without('torch'):
      module = _optional('tensorboardX', extra='tensorboard', purpose='the TensorBoard writer')
    self._summary = _optional('tensorboardX.proto.summary_pb2', extra='tensorboard',
                              purpose='the TensorBoard writer').Summary
    # A short queue, the default, makes the training loop wait for the disk.
    self._writer = module.SummaryWriter(directory, purge_step=step + 1 if step else None,
                                        max_queue=10_000, flush_secs=10)

  def write(self, step: int, values: Mapping[str, Value]) -> None:
    """Adds scalars and texts.

    Args:
      step: completed updates.
      values: scalars or texts by name.
    """
    scalars = []
    for name, value in values.items():
      value = plain(value)
      if isinstance(value, str):
        self._writer.add_text(name, value, step)
      else:
        scalars.append(self._summary.Value(tag=name, simple_value=value))
    if scalars:  # One event for all of them costs a tenth of an event each.
      self._writer.file_writer.add_summary(self._summary(value=scalars), step)

  def flush(self) -> None:
    """Writes the events to disk."""
    self._writer.flush()

  def close(self) -> None:
    """Closes the event file."""
    self._writer.close()


class WandB:
  """Writes to Weights & Biases; needs the extra `wandb`.

  Args:
    project: of the run.
    name: of the run.
    directory: where wandb keeps its files.
    run_id: the same for all attempts of a run, so that they form one; default the name.
  """

  def __init__(self, *, project: str, name: str, directory: str, run_id: str | None = None):
    module = _optional('wandb', extra='wandb', purpose='the Weights & Biases writer')
    self._run = module.init(project=project, name=name, dir=directory, id=run_id or name,
                            resume='allow')

  def write(self, step: int, values: Mapping[str, Value]) -> None:
    """Logs the values.

    Args:
      step: completed updates.
      values: scalars or texts by name.
    """
    self._run.log({name: plain(value) for name, value in values.items()}, step=step)

  def flush(self) -> None:
    """Does nothing: wandb sends from its own process."""

  def close(self) -> None:
    """Ends the run."""
    self._run.finish()


class Fanout:
  """Hands everything to several writers; without any it discards.

  Args:
    writers: in the order they are called.
  """

  def __init__(self, writers: Sequence[Writer] = ()):
    self._writers = tuple(writers)

  def write(self, step: int, values: Mapping[str, Value]) -> None:
    """Writes to every writer.

    Args:
      step: completed updates.
      values: scalars or texts by name; fetched from the device once.
    """
    if self._writers:
      values = {name: plain(value) for name, value in values.items()}
    for writer in self._writers:
      writer.write(step, values)

  def flush(self) -> None:
    """Flushes every writer."""
    for writer in self._writers:
      writer.flush()

  def close(self) -> None:
    """Closes every writer."""
    for writer in self._writers:
      writer.close()


def open_writers(workdir: str, *, step: int, process_index: int,
                 kinds: Sequence[str] = ('jsonl', 'tensorboard')) -> Fanout:
  """Opens the writers of a run; every process but the first gets one that discards.

  Args:
    workdir: run directory: gets `metrics.jsonl` and `tensorboard/`.
    step: the step the run goes on from; 0 for a start from scratch.
    process_index: of this process.
    kinds: any of 'jsonl', 'tensorboard', 'wandb'.

  Returns:
    One writer for all of them.

  Raises:
    ValueError: for an unknown kind, or one whose package is not installed.
  """
  unknown = set(kinds) - {'jsonl', 'tensorboard', 'wandb'}
  if unknown:
    raise ValueError(f"unknown metrics writer {sorted(unknown)}; allowed: 'jsonl', 'tensorboard', "
                     "'wandb'")
  if process_index:
    return Fanout()
  writers: list[Writer] = []
  for kind in kinds:
    if kind == 'jsonl':
      writers.append(Jsonl(os.path.join(workdir, 'metrics.jsonl'), step=step))
    elif kind == 'tensorboard':
      writers.append(TensorBoard(os.path.join(workdir, 'tensorboard'), step=step))
    else:
      name = os.path.basename(os.path.normpath(workdir))
      writers.append(WandB(project='t5x_like', name=name, directory=workdir))
  return Fanout(writers)


class Throughput:
  """Tokens per second over finished device work, compilation and interruptions apart.

  The time of a step is from the moment the result before it was ready to the moment its own is.
  The first step after `restart` (the one that compiles, or follows an evaluation) only sets the
  mark.

  Args:
    window: steps the current rate is taken over.
  """

  def __init__(self, *, window: int = 20):
    self._window: collections.deque[tuple[int, float]] = collections.deque(maxlen=window)
    self._last: float | None = None
    self.tokens = 0
    self.seconds = 0.0
    self.steps = 0

  def add(self, step: int, *, tokens: int, ready: float) -> None:
    """Notes a finished step.

    Args:
      step: completed updates.
      tokens: real (not padding) tokens it trained on, over all devices.
      ready: `time.perf_counter()` when its result was on the host.

    Raises:
      ValueError: if it was ready before the step before it.
    """
    if self._last is not None:
      seconds = ready - self._last
      if seconds < 0:
        raise ValueError(f'step {step} was ready {-seconds:.3g} s before the one before it; give '
                         'the times of one monotonic clock, in order')
      self._window.append((tokens, seconds))
      self.tokens += tokens
      self.seconds += seconds
      self.steps += 1
    self._last = ready

  def restart(self, *, at: float | None = None) -> None:
    """Leaves what happened since the last step out of the next one's time.

    Args:
      at: `time.perf_counter()` from which the next step counts; None leaves that step out too.
    """
    self._last = at

  @property
  def tokens_per_second(self) -> float:
    """Rate over the window; NaN before two steps are done."""
    return _ratio(sum(t for t, _ in self._window), sum(s for _, s in self._window))

  @property
  def step_seconds(self) -> float:
    """Mean time of a step over the window; NaN before two steps are done."""
    return _ratio(sum(s for _, s in self._window), len(self._window))

  @property
  def mean_tokens_per_second(self) -> float:
    """Rate over all measured steps."""
    return _ratio(self.tokens, self.seconds)


def _ratio(numerator: float, denominator: float) -> float:
  return numerator / denominator if denominator else math.nan
