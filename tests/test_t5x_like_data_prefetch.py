"""Prefetching changes when a batch is made, never which, and hides no error."""

import threading
import time

import pytest

from t5x_like.data import prefetch


@pytest.mark.parametrize('depth', [0, 1, 2, 5])
def test_gives_the_steps_in_order_then_ends(depth):
  with prefetch.prefetch(lambda step: 10 * step, 3, 9, depth=depth) as batches:
    assert list(batches) == [30, 40, 50, 60, 70, 80]
    assert list(batches) == []


@pytest.mark.parametrize('depth', [0, 2])
def test_an_error_is_raised_at_the_step_it_belongs_to(depth):
  def make(step):
    if step == 2:
      raise ValueError('shard 7 is truncated')
    return step

  with prefetch.prefetch(make, 0, depth=depth) as batches:
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(ValueError, match='shard 7 is truncated'):
      next(batches)
    with pytest.raises(StopIteration):
      next(batches)


@pytest.mark.parametrize('depth', [1, 2, 4])
def test_runs_ahead_by_its_depth_and_no_further(depth):
  made = []
  with prefetch.prefetch(made.append, 0, depth=depth) as batches:
    next(batches)
    deadline = time.monotonic() + 5
    while len(made) < 1 + depth and time.monotonic() < deadline:
      time.sleep(0.001)
    time.sleep(0.02)
    assert len(made) == 1 + max(depth, 2)


def test_close_stops_the_thread():
  def ours():
    return [t for t in threading.enumerate() if t.name == 'prefetch']

  before = len(ours())
  batches = prefetch.prefetch(lambda step: step, 0, depth=3)
  next(batches)
  assert len(ours()) == before + 1
  batches.close()
  batches.close()
  assert len(ours()) == before
  with pytest.raises(StopIteration):
    next(batches)


def test_depth_is_checked():
  with pytest.raises(ValueError, match='depth must be 0 or more, got -1'):
    prefetch.prefetch(lambda step: step, 0, depth=-1)
