"""Where the time of a run went, over all its attempts: every nanosecond in exactly one category."""

import bisect
import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from t5x_like import journal, tables

# 'lost' is only ever computed: it is time first spent as something else.
PHASES: tuple[str, ...] = ('startup', 'compile', 'productive', 'data', 'checkpoint', 'evaluation',
                           'other')
CATEGORIES: tuple[str, ...] = ('productive', 'compile', 'data', 'checkpoint', 'evaluation', 'lost',
                               'startup', 'other')
_LABELS = {
  'productive': 'productive', 'compile': 'compile', 'data': 'data stall',
  'checkpoint': 'checkpoint', 'evaluation': 'evaluation', 'lost': 'lost to restart',
  'startup': 'startup', 'other': 'other',
}
# A heartbeat of a long run may be this share of its age late, so that its file stays small.
_BEAT_SHARE = 1e-3
_LONGEST_BEAT = 10.0


@dataclasses.dataclass
class Attempt:
  """What one process lifetime wrote down (times in nanoseconds).

  Attributes:
    start: wall clock at its start.
    spent: time per phase up to its last sign of life.
    resumed: the step it went on from; None if it died before it knew.
    marks: (step, time per phase when that step's result was ready), ascending.
  """
  start: int
  spent: dict[str, int] = dataclasses.field(default_factory=dict)
  resumed: int | None = None
  marks: list[tuple[int, dict[str, int]]] = dataclasses.field(default_factory=list)

  @property
  def end(self) -> int:
    return self.start + sum(self.spent.values())

  def spent_until(self, step: int) -> dict[str, int]:
    """Time per phase when `step` was done, linear in the step between two marks."""
    upto = bisect.bisect_right(self.marks, step, key=lambda mark: mark[0])
    if upto == 0:
      return {}
    before_step, before = self.marks[upto - 1]
    if before_step == step:
      return before
    if upto == len(self.marks):
      return self.spent
    after_step, after = self.marks[upto]
    share = (step - before_step) / (after_step - before_step)
    return {name: before.get(name, 0) + int(share * (ns - before.get(name, 0)))
            for name, ns in after.items()}


@dataclasses.dataclass(frozen=True)
class Summary:
  """The account of a run.

  Attributes:
    nanoseconds: time per category; together exactly the time its attempts were alive.
    downtime: nanoseconds between attempts, when nothing ran (up to one heartbeat of a killed
      attempt is counted here).
    attempts: how often the run was started.
  """
  nanoseconds: Mapping[str, int]
  downtime: int
  attempts: int

  @property
  def wall(self) -> int:
    """Nanoseconds the attempts were alive."""
    return sum(self.nanoseconds.values())

  @property
  def goodput(self) -> float:
    """Productive share of the time since the first start, downtime included."""
    return self.nanoseconds['productive'] / max(1, self.wall + self.downtime)

  def as_dict(self) -> dict[str, Any]:
    """Returns seconds per category and the totals, JSON-able."""
    return {
      'seconds': {name: ns / 1e9 for name, ns in self.nanoseconds.items()},
      'wall_seconds': self.wall / 1e9,
      'downtime_seconds': self.downtime / 1e9,
      'attempts': self.attempts,
      'goodput': self.goodput,
    }

  def rows(self) -> list[list[str]]:
    """Returns [label, seconds, share of the wall time] per category that took time."""
    wall = max(1, self.wall)
    rows = [[_LABELS[name], f'{ns / 1e9:,.1f}', f'{100 * ns / wall:.1f} %']
            for name, ns in self.nanoseconds.items() if ns]
    rows.append([f'wall time of {self.attempts} attempt{"s" * (self.attempts != 1)}',
                 f'{self.wall / 1e9:,.1f}', '100.0 %'])
    if self.attempts > 1:
      rows.append(['downtime between attempts', f'{self.downtime / 1e9:,.1f}', ''])
    return rows

  def table(self) -> str:
    """Returns the account as aligned text."""
    return (tables.text_table(('time', 'seconds', 'share'), self.rows(), align='lrr')
            + f'\ngoodput {100 * self.goodput:.1f} % (productive / (wall + downtime))')


def account(attempts: Sequence[Attempt]) -> Summary:
  """Adds up attempts and moves repeated work to 'lost'.

  An attempt's work counts up to the earliest step that any later attempt went on from: productive
  and data time after it is lost, and so are start-up and compilation of every attempt but the
  first, which only the restart made necessary.

  Args:
    attempts: in the order they ran.

  Returns:
    The account.
  """
  totals = dict.fromkeys(CATEGORIES, 0)
  downtime = 0
  for index, attempt in enumerate(attempts):
    spent = {name: attempt.spent.get(name, 0) for name in PHASES}
    later = [a.resumed for a in attempts[index + 1:] if a.resumed is not None]
    moved = {name: spent[name] for name in ('startup', 'compile') if index}
    if later:
      kept = attempt.spent_until(min(later))
      for name in ('productive', 'data'):
        moved[name] = max(0, spent[name] - kept.get(name, 0))
    for name in PHASES:
      totals[name] += spent[name] - moved.get(name, 0)
    totals['lost'] += sum(moved.values())
    if index:
      downtime += max(0, attempt.start - attempts[index - 1].end)
  return Summary(totals, downtime, len(attempts))


def load(path: str) -> list[Attempt]:
  """Reads the attempts a ledger file tells of.

  Args:
    path: the file; missing means no attempts.

  Returns:
    Attempts in the order they ran.

  Raises:
    ValueError: if the file is no ledger.
  """
  attempts: list[Attempt] = []
  if not os.path.exists(path):
    return attempts
  try:
    for record in journal.read(path):
      if record['event'] == 'start':
        attempts.append(Attempt(start=record['wall_ns']))
        continue
      attempt, step = attempts[-1], record['step']
      attempt.spent = record['ns']
      if record['event'] == 'resume':
        attempt.resumed = step
      if step is not None and (not attempt.marks or step > attempt.marks[-1][0]):
        attempt.marks.append((step, record['step_ns']))
  except (KeyError, IndexError) as error:
    raise ValueError(f'{path} is no time ledger ({error!r}). Move it away to start a new '
                     'account.') from error
  return attempts


def process_start() -> float:
  """Returns the wall-clock time (seconds since the epoch) this process began, imports included."""
  try:
    with open('/proc/self/stat', encoding='ascii', errors='replace') as file:
      ticks = int(file.read().rpartition(')')[2].split()[19])
    with open('/proc/uptime', encoding='ascii') as file:
      uptime = float(file.read().split()[0])
    return min(time.time(), time.time() - uptime + ticks / os.sysconf('SC_CLK_TCK'))
  except (OSError, ValueError, IndexError):  # Not Linux: count from here.
    return time.time()


class Ledger:
  """Accounts the time of this process, and of the attempts before it, to categories.

  The time between phases is 'startup' until the first step is done and 'other' afterwards; a
  phase inside another takes its time out of the outer one. State reaches the file with every
  heartbeat, so a SIGKILL leaves at most one heartbeat unaccounted. Phases belong to one thread.

  Args:
    path: the ledger file (JSON lines), appended to over all attempts; None keeps this process's
      account in memory only (every process but the first).
    started: wall-clock seconds at which this attempt began; default now. See `process_start`.
    heartbeat: seconds between writes, at first (a run of many hours writes every 10 s); None
      writes only when told to.
    clock: monotonic nanoseconds.
    wall: wall-clock nanoseconds.
  """

  def __init__(self, path: str | None, *, started: float | None = None,
               heartbeat: float | None = 1.0, clock: Callable[[], int] = time.monotonic_ns,
               wall: Callable[[], int] = time.time_ns):
    now = wall()
    start = now if started is None else min(now, int(started * 1e9))
    self._history = load(path) if path is not None else []
    self._journal = journal.Journal(path) if path is not None else None
    self._clock = clock
    self._since = clock()
    self._stack = ['startup']
    self._lock = threading.Lock()
    # Held around a write, so that a slow disk never blocks a phase.
    self._write_lock = threading.Lock()
    self._open = True
    self._stop = threading.Event()
    self._attempt = Attempt(start, spent=dict.fromkeys(PHASES, 0))
    self._attempt.spent['startup'] = now - start
    self._step: int | None = None
    self._step_spent: dict[str, int] = {}
    if self._journal is not None:
      self._journal.append({'event': 'start', 'attempt': len(self._history) + 1,
                            'wall_ns': start})
      self.beat()
      if heartbeat is not None:
        threading.Thread(target=self._beats, args=(heartbeat,), daemon=True,
                         name='ledger').start()

  def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
    """Accounts the body of a `with` to a phase.

    Args:
      name: one of `PHASES`.

    Returns:
      A context manager.

    Raises:
      ValueError: for another name.
    """
    if name not in PHASES:
      raise ValueError(f'unknown phase {name!r}; a ledger knows {", ".join(PHASES)}')
    return self._phase(name)

  @contextlib.contextmanager
  def _phase(self, name: str) -> Iterator[None]:
    with self._lock:
      self._charge()
      self._stack.append(name)
    try:
      yield
    finally:
      with self._lock:
        self._charge()
        self._stack.pop()

  def resume(self, step: int) -> None:
    """Notes the step this attempt goes on from: 0 for a start from scratch.

    Args:
      step: completed steps in the state that was restored.
    """
    self._note_step(step)
    self._attempt.resumed = step
    self._write('resume')

  def step(self, step: int) -> None:
    """Notes that the result of a step is ready.

    Args:
      step: completed steps, counted from 1.
    """
    self._note_step(step)
    if self._stack[0] == 'startup':
      self._stack[0] = 'other'

  def beat(self) -> None:
    """Writes the state of this attempt to the file."""
    self._write('beat')

  def productive_seconds(self) -> float:
    """Returns the productive seconds of this attempt so far."""
    with self._lock:
      self._charge()
      return self._attempt.spent['productive'] / 1e9

  def summary(self) -> Summary:
    """Returns the account of all attempts up to now."""
    with self._lock:
      self._charge()
      attempt = dataclasses.replace(self._attempt, spent=dict(self._attempt.spent))
    return account([*self._history, attempt])

  def close(self) -> None:
    """Stops the clock and writes the end of this attempt; further calls do nothing."""
    self._stop.set()
    self._write('end')
    with self._write_lock, self._lock:
      self._open = False
      if self._journal is not None:
        self._journal.close()

  def __enter__(self) -> 'Ledger':
    return self

  def __exit__(self, *exc: object) -> None:
    self.close()

  def _charge(self) -> None:
    if self._open:
      now = self._clock()
      self._attempt.spent[self._stack[-1]] += now - self._since
      self._since = now

  def _note_step(self, step: int) -> None:
    with self._lock:
      self._charge()
      self._step = step
      self._step_spent = self._attempt.spent.copy()

  def _write(self, event: str) -> None:
    with self._write_lock:
      with self._lock:
        self._charge()
        record = {'event': event, 'attempt': len(self._history) + 1, 'step': self._step,
                  'ns': {name: ns for name, ns in self._attempt.spent.items() if ns},
                  'step_ns': {name: ns for name, ns in self._step_spent.items() if ns}}
      if self._open and self._journal is not None:
        self._journal.append(record)

  def _beats(self, heartbeat: float) -> None:
    wait = heartbeat
    while not self._stop.wait(wait):
      self.beat()
      alive = sum(self._attempt.spent.values()) / 1e9
      wait = max(heartbeat, min(_BEAT_SHARE * alive, _LONGEST_BEAT))
