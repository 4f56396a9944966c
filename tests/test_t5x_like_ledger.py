"""The ledger: every nanosecond in one category, over kills and restarts."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_like import ledger

SECOND = 10 ** 9


class Clock:
  """One clock for both readings, moved by hand."""

  def __init__(self, now=1_000_000 * SECOND):
    self.now = now

  def __call__(self):
    return self.now

  def advance(self, seconds):
    self.now += int(seconds * SECOND)


def new(path, clock, **kwargs):
  return ledger.Ledger(path and str(path), heartbeat=None, clock=clock, wall=clock, **kwargs)


def spend(book, clock, **phases):
  for name, seconds in phases.items():
    with book.phase(name):
      clock.advance(seconds)


def train(book, clock, *, start, stop, seconds=1.0):
  for step in range(start + 1, stop + 1):
    spend(book, clock, data=0.25, productive=seconds)
    book.step(step)
    book.beat()


def seconds(summary):
  return {name: ns / SECOND for name, ns in summary.nanoseconds.items() if ns}


def test_categories_of_one_attempt(tmp_path):
  clock = Clock()
  book = new(tmp_path / 'ledger.jsonl', clock, started=clock.now / SECOND - 3)
  clock.advance(2)
  book.resume(0)
  spend(book, clock, compile=7)
  train(book, clock, start=0, stop=4)
  spend(book, clock, evaluation=5, checkpoint=0.5)
  clock.advance(0.125)
  book.close()
  clock.advance(99)  # After the end nothing is counted.
  found = book.summary()
  assert seconds(found) == {'startup': 5, 'compile': 7, 'data': 1, 'productive': 4,
                            'evaluation': 5, 'checkpoint': 0.5, 'other': 0.125}
  assert found.wall == 22.625 * SECOND and found.downtime == 0
  assert ledger.account(ledger.load(str(tmp_path / 'ledger.jsonl'))) == found


def test_inner_phases_take_their_time_out_of_the_outer():
  clock = Clock()
  book = new(None, clock)
  with book.phase('evaluation'):
    clock.advance(1)
    with book.phase('compile'):
      clock.advance(2)
    clock.advance(4)
  with pytest.raises(RuntimeError), book.phase('checkpoint'):
    clock.advance(8)
    raise RuntimeError
  clock.advance(16)
  assert seconds(book.summary()) == {'evaluation': 5, 'compile': 2, 'checkpoint': 8, 'startup': 16}


def test_work_after_the_resumed_step_is_lost(tmp_path):
  path, clock = tmp_path / 'ledger.jsonl', Clock()
  first = new(path, clock)
  first.resume(0)
  spend(first, clock, compile=3)
  train(first, clock, start=0, stop=10)
  clock.advance(30)  # Killed; nothing ran.
  second = new(path, clock)
  clock.advance(2)
  spend(second, clock, compile=1)
  second.resume(6)
  train(second, clock, start=6, stop=12)
  found = second.summary()
  # Steps 7 to 10 (1.25 s each) were done twice, and the restart cost 2 + 1 s.
  assert seconds(found) == {'productive': 12, 'data': 3, 'compile': 3, 'lost': 4 * 1.25 + 3}
  assert found.downtime == 30 * SECOND and found.attempts == 2
  assert found.goodput == pytest.approx(12 / (found.wall / SECOND + 30))
  assert 'lost to restart' in found.table() and 'downtime between attempts' in found.table()


def test_falling_back_to_an_older_checkpoint_loses_from_every_attempt(tmp_path):
  path, clock = tmp_path / 'ledger.jsonl', Clock()
  for resumed, stop in ((0, 8), (6, 10), (4, 5)):
    book = new(path, clock)
    book.resume(resumed)
    train(book, clock, start=resumed, stop=stop)
  # Kept: steps 1 to 4 of the first, none of the second, 5 of the third.
  found = ledger.account(ledger.load(str(path)))
  assert found.nanoseconds['productive'] == 5 * SECOND
  assert found.nanoseconds['lost'] == int((4 + 4) * 1.25 * SECOND)


def test_an_attempt_that_died_at_start_up_loses_only_itself(tmp_path):
  path, clock = tmp_path / 'ledger.jsonl', Clock()
  first = new(path, clock)
  first.resume(0)
  train(first, clock, start=0, stop=3)
  second = new(path, clock)
  clock.advance(5)
  second.beat()
  third = new(path, clock)
  third.resume(3)
  assert seconds(third.summary()) == {'productive': 3, 'data': 0.75, 'lost': 5}


def test_steps_between_marks_are_shared_out(tmp_path):
  path, clock = tmp_path / 'ledger.jsonl', Clock()
  first = new(path, clock)
  first.resume(0)
  for step in range(1, 11):
    spend(first, clock, productive=1)
    first.step(step)
  first.beat()  # The only mark.
  second = new(path, clock)
  second.resume(7)
  assert seconds(second.summary()) == {'productive': 7, 'lost': 3}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(
  st.integers(0, 5),
  st.lists(st.tuples(st.sampled_from(ledger.PHASES), st.floats(0, 3), st.booleans()),
           max_size=12), st.floats(0, 50)), min_size=1, max_size=5))
def test_categories_sum_to_the_wall_time_exactly(tmp_path_factory, attempts):
  path, clock = tmp_path_factory.mktemp('l') / 'ledger.jsonl', Clock()
  alive = 0
  for resumed, events, gap in attempts:
    begin = clock.now
    book = new(path, clock)
    book.resume(resumed)
    step = resumed
    for phase, length, done in events:
      spend(book, clock, **{phase: length})
      clock.advance(0.01)
      if done:
        step += 1
        book.step(step)
    book.beat()
    alive += clock.now - begin
    live = book.summary()
    assert live.wall == alive and min(live.nanoseconds.values()) >= 0
    assert ledger.account(ledger.load(str(path))) == live
    clock.advance(gap)


CHILD = '''
import sys, time
from t5x_like import ledger
book = ledger.Ledger(sys.argv[1], heartbeat=0.05)
book.resume(0)
print('up', flush=True)
step = 0
while True:
  with book.phase('productive'):
    time.sleep(0.01)
  step += 1
  book.step(step)
'''


def test_survives_sigkill(tmp_path):
  path = tmp_path / 'ledger.jsonl'
  child = subprocess.Popen([sys.executable, '-c', CHILD, str(path)], stdout=subprocess.PIPE)
  assert child.stdout is not None and child.stdout.readline() == b'up\n'
  begin = time.monotonic()
  time.sleep(0.8)
  child.send_signal(signal.SIGKILL)
  lived = time.monotonic() - begin
  child.wait()
  child.stdout.close()
  with open(path, 'ab') as file:
    file.write(b'{"event": "beat", "att')  # A torn line must not matter.
  attempt, = ledger.load(str(path))
  # The heartbeat may be late on a busy machine, but not by this much.
  assert lived - 0.5 < attempt.spent['productive'] / SECOND <= lived + 0.05
  book = ledger.Ledger(str(path), heartbeat=None)
  book.resume(10)
  book.close()
  found = ledger.account(ledger.load(str(path)))
  assert found.attempts == 2 and found.nanoseconds['lost'] > 0.1 * SECOND
  assert 0.05 < found.nanoseconds['productive'] / SECOND < lived
  for line in path.read_bytes().splitlines():
    json.loads(line)


def test_a_phase_and_a_step_cost_little(tmp_path):
  with ledger.Ledger(str(tmp_path / 'ledger.jsonl')) as book:
    begin = time.perf_counter()
    for step in range(10_000):
      with book.phase('data'):
        pass
      with book.phase('productive'):
        pass
      book.step(step)
    assert (time.perf_counter() - begin) / 10_000 < 50e-6


def test_errors_name_what_is_wrong(tmp_path):
  with pytest.raises(ValueError, match="unknown phase 'lost'; a ledger knows startup, compile"):
    ledger.Ledger(None).phase('lost')
  path = tmp_path / 'ledger.jsonl'
  path.write_text('{"step": 1}\n')
  with pytest.raises(ValueError, match='is no time ledger .* Move it away'):
    ledger.Ledger(str(path))


def test_process_start_is_in_the_recent_past():
  assert 0 <= time.time() - ledger.process_start() < 24 * 3600
  code = 'from t5x_like import ledger; import time; print(time.time() - ledger.process_start())'
  age = float(subprocess.run([sys.executable, '-c', code], capture_output=True, check=True,
                             cwd=os.getcwd()).stdout)
  assert 0 <= age < 30
