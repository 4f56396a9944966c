"""Evaluation covers whole documents once, in order, and counts exactly their bytes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_like.data import eval_loader, store

VOCABULARY = {'kind': 'bytes', 'fingerprint': 'v', 'vocab_size': 1 << 17, 'pad_id': 0, 'eos_id': 1,
              'bos_id': None}


def write(root, name, lengths, *, first):
  documents, at = [], first
  for i, n in enumerate(lengths):
    documents.append({'features': {'targets': np.arange(at, at + n)}, 'text_bytes': 10 * n + i,
                      'file': name, 'position': i, 'hash': bytes(16)})
    at += n
  path = str(root / name / 'validation')
  info = store.write_shard(path, index=0, documents=documents, features={'targets': 1 << 17})
  store.finish_store(path, shards=[info], features={'targets': 1 << 17}, task={},
                     vocabulary=VOCABULARY)


def make(root, sources, **kwargs):
  return eval_loader.EvalLoader(**{'sources': sources, 'store_dir': str(root), 'batch_size': 2,
                                   'length': 6, **kwargs})


lengths = st.lists(st.integers(1, 20), min_size=1, max_size=8)


@settings(max_examples=30, deadline=None)
@given(a=lengths, b=lengths, max_batches=st.one_of(st.none(), st.integers(1, 12)))
def test_tokens_with_weight_are_whole_documents_and_bytes_are_theirs(tmp_path_factory, a, b,
                                                                     max_batches):
  root = tmp_path_factory.mktemp('s')
  write(root, 'a', a, first=1)
  write(root, 'b', b, first=1000)
  try:
    built = make(root, ['a', 'b'], max_batches=max_batches)
  except ValueError as error:
    assert 'cover no whole document' in str(error) and max_batches is not None
    return
  assert len(built) >= 1 and (max_batches is None or len(built) <= max_batches)
  batches = [built.batch(i) for i in range(len(built))]
  assert all({k: (v.shape, v.dtype) for k, v in x.items()} == built.spec for x in batches)
  merged = {k: np.concatenate([x[k] for x in batches]) for k in built.spec}
  scored = merged['targets'][merged['loss_weights'] > 0]
  np.testing.assert_array_equal(merged['loss_weights'] > 0, merged['segment_ids'] > 0)
  whole = {name: [list(range(f + sum(of[:i]), f + sum(of[:i + 1]))) for i in range(len(of))]
           for name, of, f in (('a', a, 1), ('b', b, 1000))}
  covered = {name: [i for i, d in enumerate(docs) if d[0] in set(scored)]
             for name, docs in whole.items()}
  assert scored.tolist() == [t for n in 'ab' for i in covered[n] for t in whole[n][i]]
  assert all(c == list(range(len(c))) for c in covered.values())
  assert built.bytes == sum(10 * len(whole[n][i]) + i for n in 'ab' for i in covered[n])
  assert built.tokens == len(scored) and built.documents == sum(map(len, covered.values()))
  if max_batches is None:
    assert built.tokens == sum(a) + sum(b)


def test_rows_of_a_process_are_those_of_the_whole(tmp_path):
  write(tmp_path, 'a', [5, 9, 3, 20], first=1)
  built = make(tmp_path, 'a', batch_size=4)
  for i in range(len(built)):
    whole = built.batch(i)
    for name, part in built.batch(i, rows=[3, 1]).items():
      np.testing.assert_array_equal(part, whole[name][[3, 1]])


def test_bytes_are_those_of_the_targets(tmp_path):
  for name, said in (('said', True), ('silent', False)):
    path, features = str(tmp_path / name / 'validation'), {'inputs': 99, 'targets': 99}
    documents = [{'features': {'inputs': np.arange(5), 'targets': np.arange(3)}, 'text_bytes': 80,
                  'file': 'f', 'position': i, 'hash': bytes(16),
                  **({'feature_bytes': {'inputs': 70, 'targets': 10 + i}} if said else {})}
                 for i in range(4)]
    info = store.write_shard(path, index=0, documents=documents, features=features)
    store.finish_store(path, shards=[info], features=features, task={}, vocabulary=VOCABULARY)
  built = make(tmp_path, 'said')
  assert built.bytes == 10 + 11 + 12 + 13
  assert sum(built.batch(i)['loss_weights'].sum() for i in range(len(built))) == 4 * 3
  assert make(tmp_path, 'said', max_batches=1).bytes == 10  # Of 12 tokens, one document fits whole.
  assert make(tmp_path, 'silent').bytes is None


def test_bad_arguments_are_named(tmp_path):
  write(tmp_path, 'a', [50], first=1)
  with pytest.raises(ValueError, match='max_batches=1 of 2 rows of 6 tokens cover no whole '
                                       'document of a: raise it'):
    make(tmp_path, 'a', max_batches=1)
  with pytest.raises(ValueError, match='max_batches must be a whole number above 0, got 0'):
    make(tmp_path, 'a', max_batches=0)
  with pytest.raises(ValueError, match='batch 5 does not exist: there are 5'):
    make(tmp_path, 'a').batch(5)
  write(tmp_path, 'b', [5], first=1)
  write(tmp_path, 'c', [5], first=1)
  with pytest.raises(ValueError, match='max_batches leaves 2 rows for 3 sources: raise it'):
    make(tmp_path, ['a', 'b', 'c'], max_batches=1)
