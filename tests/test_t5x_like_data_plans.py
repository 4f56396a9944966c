"""Packing: every token in one piece, no row too long, close to full, kept beside the store."""

import os

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_like.data import loader as loader_lib
from t5x_like.data import plans, store

VOCABULARY = {'kind': 'bytes', 'fingerprint': 'v', 'vocab_size': 9, 'pad_id': 0, 'eos_id': 1,
              'bos_id': None}


def write(path, lengths):
  documents = [{'features': {'targets': np.full(n, 3)}, 'text_bytes': n, 'file': 'a', 'position': i,
                'hash': bytes(16)} for i, n in enumerate(lengths)]
  info = store.write_shard(path, index=0, documents=documents, features={'targets': 9})
  return store.finish_store(path, shards=[info], features={'targets': 9}, task={},
                            vocabulary=VOCABULARY)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), max_size=60), length=st.integers(1, 25))
def test_every_token_is_in_one_piece_and_rows_fit(lengths, length):
  bounds, pieces = plans.compute(np.array(lengths, np.int64), length=length)
  assert bounds[0] == 0 and bounds[-1] == len(pieces) and np.all(np.diff(bounds) > 0)
  tokens = [(p['document'], t) for p in pieces for t in range(p['start'], p['start'] + p['length'])]
  assert sorted(tokens) == [(d, t) for d, n in enumerate(lengths) for t in range(n)]
  for first, last in zip(bounds[:-1], bounds[1:], strict=True):
    assert pieces['length'][first:last].sum() <= length
  # Only pieces of a document longer than a row begin inside it, and those are cut at whole rows.
  assert np.all(pieces['start'] % length == 0)


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(0, 12), min_size=1, max_size=14))
def test_equals_best_fit_decreasing_one_piece_at_a_time(counts):
  length = len(counts)
  histogram = np.array([0, *counts])
  rooms: list[int] = []
  for piece in range(length, 0, -1):
    for _ in range(histogram[piece]):
      fitting = [r for r in rooms if r >= piece]
      room = min(fitting, default=length)
      if fitting:
        rooms.remove(room)
      rooms.append(room - piece)
  groups = plans.best_fit(histogram, length=length)
  ours = [length - sum(p * n for p, n in pattern) for pattern, rows in groups for _ in range(rows)]
  assert sorted(ours) == sorted(rooms)


def test_rows_are_close_to_full():
  lengths = np.random.default_rng(0).lognormal(4, 1, 20000).astype(np.int64) + 1
  bounds, pieces = plans.compute(lengths, length=512)
  assert pieces['length'].sum() / 512 / (len(bounds) - 1) > 0.995


def loader(root):
  return loader_lib.Loader(sources='a', store_dir=str(root), batch_size=2, length=16, seed=0,
                           packing='pack')


def plan_files(path):
  return sorted(name for name in os.listdir(path) if 'plan' in name)


def test_plan_is_kept_and_replaced_when_damaged(tmp_path, monkeypatch):
  path = str(tmp_path / 'a' / 'train')
  built = write(path, [5, 9, 40, 3, 3])
  first = loader(tmp_path).batch(3)
  names = plan_files(path)
  assert len(names) == 2 and all(built.fingerprint[:16] in n for n in names)
  with monkeypatch.context() as patched:
    patched.setattr(plans, 'compute', None)  # Not needed again.
    np.testing.assert_array_equal(loader(tmp_path).batch(3)['segment_ids'], first['segment_ids'])
  pieces = os.path.join(path, next(n for n in names if 'pieces' in n))
  os.truncate(pieces, 16)
  np.testing.assert_array_equal(loader(tmp_path).batch(3)['segment_ids'], first['segment_ids'])
  assert os.path.getsize(pieces) > 16


def test_works_where_nothing_can_be_written(tmp_path, monkeypatch):
  path = str(tmp_path / 'a' / 'train')
  write(path, [5, 9, 40, 3, 3])

  def refuse(*args, **kwargs):
    raise OSError(30, 'Read-only file system')

  # Permissions would not stop a superuser.
  monkeypatch.setattr(plans.shards.tempfile, 'mkstemp', refuse)
  read_only = loader(tmp_path)
  assert plan_files(path) == []
  monkeypatch.undo()
  np.testing.assert_array_equal(read_only.batch(5)['targets'], loader(tmp_path).batch(5)['targets'])
