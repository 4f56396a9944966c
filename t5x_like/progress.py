"""Shows how far a run is: a bar in a terminal, plain lines in a log."""

import collections
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Literal, TextIO

from t5x_like import tables

_BAR_SECONDS = 0.1
_SAMPLE_SECONDS = 1.0
_SAMPLES = 60


class Progress:
  """Reports step, loss, tokens/s, MFU, elapsed time and time left.

  The time left is taken from the pace of the last minute or so of productive time, so neither the
  compilation nor an evaluation distorts it. An update that draws nothing costs about a
  microsecond.

  Args:
    total: steps of the run.
    start: step it goes on from.
    mode: 'bar', 'lines', 'off' (every process but the first), or 'auto': a bar if the stream is
      a terminal, else lines.
    every: seconds between lines; the first and last step always get one.
    productive: seconds of productive time so far, as `Ledger.productive_seconds`; default the
      time since the first update.
    stream: default stderr, so that stdout stays free for results.
    clock: seconds.
  """

  def __init__(self, total: int, *, start: int = 0,
               mode: Literal['auto', 'bar', 'lines', 'off'] = 'auto', every: float = 10.0,
               productive: Callable[[], float] | None = None, stream: TextIO | None = None,
               clock: Callable[[], float] = time.monotonic):
    if mode not in ('auto', 'bar', 'lines', 'off'):
      raise ValueError(f"unknown progress mode {mode!r}; allowed: 'auto', 'bar', 'lines', 'off'")
    self._stream = sys.stderr if stream is None else stream
    if mode == 'auto':
      terminal = self._stream.isatty() and os.environ.get('TERM') != 'dumb'
      mode = 'bar' if terminal else 'lines'
    self.mode = mode
    self._total = total
    self._step = self._shown = start
    self._values: Mapping[str, float] = {}
    self._clock = clock
    self._productive = clock if productive is None else productive
    self._begin = clock()
    self._next_draw = self._next_sample = -float('inf')
    self._interval = _BAR_SECONDS if mode == 'bar' else every
    self._samples: collections.deque[tuple[int, float]] = collections.deque(maxlen=_SAMPLES)
    self._bar = _Bar(total, start, self._stream) if mode == 'bar' else None

  def update(self, step: int, values: Mapping[str, float]) -> None:
    """Notes that a step is done, and draws if it is time to.

    Args:
      step: completed updates.
      values: any of 'loss', 'tokens_per_second', 'mfu' (a fraction); more names are shown as they
        are in lines.
    """
    self._step, self._values = step, values
    if self.mode == 'off':
      return
    now = self._clock()
    if now >= self._next_sample:
      self._samples.append((step, self._productive()))
      self._next_sample = now + _SAMPLE_SECONDS
    if now >= self._next_draw or step >= self._total:
      self._draw(now)

  def seconds_left(self) -> float | None:
    """Returns the expected productive seconds to the last step; None before there is a pace."""
    if len(self._samples) < 2 or self._samples[-1][0] <= self._samples[0][0]:
      return None
    (first, since), (last, until) = self._samples[0], self._samples[-1]
    return max(0, self._total - self._step) * (until - since) / (last - first)

  def message(self, text: str) -> None:
    """Prints a line beside the bar without tearing it.

    Args:
      text: without a final newline.
    """
    if self.mode == 'off':
      return
    if self._bar is not None:
      self._bar.print(text)
    else:
      print(text, file=self._stream, flush=True)

  def close(self) -> None:
    """Draws the last state and gives the terminal back; further calls do nothing."""
    if self.mode == 'off':
      return
    if self._shown != self._step:
      self._draw(self._clock())
    if self._bar is not None:
      self._bar.stop()
    self.mode = 'off'

  def __enter__(self) -> 'Progress':
    return self

  def __exit__(self, *exc: object) -> None:
    self.close()

  def _draw(self, now: float) -> None:
    self._next_draw = now + self._interval
    self._shown = self._step
    left = self.seconds_left()
    times = [tables.duration_text(now - self._begin),
             f'ETA {tables.duration_text(left)}' if left is not None else 'ETA -']
    if self._bar is not None:
      # A bar has to fit beside its numbers in 80 columns.
      numbers = ' '.join([*_known(self._values), *times]).replace('tokens/s', 'tok/s')
      self._bar.draw(self._step, numbers)
      return
    percent = 100 * self._step / max(1, self._total)
    head = [f'step {self._step:,}/{self._total:,} ({percent:.1f} %)']
    others = [f'{name} {value:.4g}' if isinstance(value, float) else f'{name} {value}'
              for name, value in self._values.items() if name not in _KNOWN]
    print('  '.join([*head, *_known(self._values), *others, f'elapsed {times[0]}', times[1]]),
          file=self._stream, flush=True)


_KNOWN: dict[str, Callable[[float], str]] = {
  'loss': lambda value: f'loss {value:.3f}',
  'tokens_per_second': lambda value: f'{tables.count_text(value)} tokens/s',
  'mfu': lambda value: f'MFU {100 * value:.1f} %',
}


def _known(values: Mapping[str, float]) -> list[str]:
  # Not a number means not measured yet, except for the loss, where it is news.
  return [text(values[name]) for name, text in _KNOWN.items()
          if name in values and (name == 'loss' or values[name] == values[name])]


class _Bar:
  """The bar itself: rich, started at once."""

  def __init__(self, total: int, start: int, stream: TextIO):
    # rich takes 0.1 s to import, which a job without a terminal need not pay.
    from rich import console, progress
    columns = (progress.TextColumn('{task.completed:,.0f}/{task.total:,.0f}'),
               progress.BarColumn(bar_width=None),
               progress.TextColumn('{task.percentage:.0f} %'),
               progress.TextColumn('{task.fields[numbers]}'))
    # Text printed to a stdout that is a file or a pipe must arrive there, not in the terminal.
    self._progress = progress.Progress(
      *columns, console=console.Console(file=stream), expand=True,
      redirect_stdout=sys.stdout.isatty(), redirect_stderr=True)
    self._task = self._progress.add_task('', total=total, completed=start, numbers='')
    self._progress.start()

  def draw(self, step: int, numbers: str) -> None:
    self._progress.update(self._task, completed=step, numbers=numbers)

  def print(self, text: str) -> None:
    self._progress.console.print(text, markup=False, highlight=False)

  def stop(self) -> None:
    self._progress.stop()
