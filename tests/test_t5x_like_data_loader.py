"""batch(step): every token once per epoch, the same on any number of processes, and invertible."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_like.data import loader as loader_lib
from t5x_like.data import store

VOCABULARY = {'kind': 'bytes', 'fingerprint': 'v', 'vocab_size': 1 << 17, 'pad_id': 0, 'eos_id': 1,
              'bos_id': None}
PACKINGS = ('concat', 'pack', 'none')


def write(root, name, lengths, *, first=1, inputs=None, split='train', **vocabulary):
  """Writes a store whose tokens are first, first + 1, ...; inputs[i] of document i are inputs."""
  features = {'targets': 1 << 17} | ({'inputs': 1 << 17} if inputs else {})
  documents, at = [], first
  for i, n in enumerate(lengths):
    tokens = np.arange(at, at + n)
    at += n
    cut = inputs[i] if inputs else 0
    made = {'targets': tokens[cut:]} | ({'inputs': tokens[:cut]} if inputs else {})
    documents.append({'features': made, 'text_bytes': 2 * n, 'file': f'{name}.txt', 'position': i,
                      'hash': at.to_bytes(16, 'big')})
  path = str(root / name / split)
  half = len(documents) // 2
  infos = [store.write_shard(path, index=i, documents=d, features=features)
           for i, d in enumerate((documents[:half], documents[half:]))]
  store.finish_store(path, shards=infos, features=features, task={'name': name},
                     vocabulary={**VOCABULARY, **vocabulary})


def make(root, sources, **kwargs):
  return loader_lib.Loader(**{'sources': sources, 'store_dir': str(root), 'batch_size': 3,
                              'length': 8, 'seed': 0, 'period': 32, **kwargs})


lengths = st.lists(st.integers(1, 30), min_size=1, max_size=12)


@settings(max_examples=25, deadline=None)
@given(lengths=lengths, length=st.integers(1, 12), packing=st.sampled_from(('concat', 'pack')),
       with_inputs=st.booleans())
def test_every_token_is_a_target_once_per_epoch(tmp_path_factory, lengths, length, packing,
                                                with_inputs):
  root = tmp_path_factory.mktemp('s')
  inputs = [n // 3 for n in lengths] if with_inputs else None
  write(root, 'a', lengths, inputs=inputs)
  built = make(root, 'a', length=length, packing=packing, batch_size=1)
  rows = built.describe()['sources']['a']['rows']
  document_of = np.repeat(np.arange(len(lengths)), lengths)
  starts = np.cumsum(lengths) - lengths
  prefix = np.array(inputs if inputs else [0] * len(lengths))
  seen = []
  for step in range(rows):
    batch = {k: v[0] for k, v in built.batch(step).items()}
    real = batch['segment_ids'] > 0
    assert not batch['targets'][~real].any() and not batch['loss_weights'][~real].any()
    assert not batch['positions'][~real].any() and not batch['inputs'][~real].any()
    targets = batch['targets'][real]
    token = targets - 1
    seen += targets.tolist()
    at = token - starts[document_of[token]]
    # The tokens are numbered, so the token before is one less, and 0 (bos) at a document's start.
    np.testing.assert_array_equal(batch['inputs'][real], np.where(at == 0, 0, targets - 1))
    np.testing.assert_array_equal(batch['loss_weights'][real],
                                  (at >= prefix[document_of[token]]).astype(np.float32))
    segment = batch['segment_ids'][real]
    np.testing.assert_array_equal(segment[1:] != segment[:-1],
                                  document_of[token][1:] != document_of[token][:-1])
    assert segment[0] == 1 and set(np.diff(segment)) <= {0, 1}
    for s in set(segment):
      np.testing.assert_array_equal(batch['positions'][real][segment == s],
                                    np.arange((segment == s).sum()))
  assert sorted(seen) == list(range(1, sum(lengths) + 1))


@settings(max_examples=12, deadline=None)
@given(a=lengths, b=lengths, c=lengths, packing=st.sampled_from(PACKINGS),
       batch_size=st.integers(8, 20), seed=st.integers(0, 9), step=st.integers(0, 10**9))
def test_batch_is_the_same_for_any_number_of_processes(tmp_path_factory, a, b, c, packing,
                                                       batch_size, seed, step):
  root = tmp_path_factory.mktemp('s')
  for name, of in (('a', a), ('b', b), ('c', c)):
    write(root, name, of)
  kwargs = dict(packing=packing, batch_size=batch_size, seed=seed)
  mixture = {'a': 3.0, 'b': 1.0, 'c': 0.5}
  whole = make(root, mixture, **kwargs).batch(step)
  for processes in (1, 2, 3, 8):
    parts = [np.array_split(np.arange(batch_size), processes)[i] for i in range(processes)]
    # Each has a loader of its own, as a process would, and its sources in another order.
    own = [make(root, dict(reversed(mixture.items())), **kwargs).batch(step, rows=r) for r in parts]
    for name, values in whole.items():
      np.testing.assert_array_equal(np.concatenate([o[name] for o in own]), values)


@pytest.mark.parametrize('packing', PACKINGS)
def test_seeking_equals_iterating_over_a_change_of_rates(tmp_path, packing):
  write(tmp_path, 'a', [5, 9, 3, 20])
  write(tmp_path, 'b', [7, 7])
  kwargs = dict(packing=packing, changes=[(12, {'a': 1, 'b': 4})])
  one = make(tmp_path, {'a': 2, 'b': 1}, **kwargs)
  iterated = [one.batch(k) for k in range(40)]
  for k in (39, 0, 21, 11):
    for name, values in make(tmp_path, {'a': 2, 'b': 1}, **kwargs).batch(k).items():
      np.testing.assert_array_equal(values, iterated[k][name])


@settings(max_examples=15, deadline=None)
@given(a=lengths, b=lengths, packing=st.sampled_from(PACKINGS), step=st.integers(0, 60))
def test_contents_say_what_the_batch_holds_and_locate_inverts_them(tmp_path_factory, a, b, packing,
                                                                   step):
  root = tmp_path_factory.mktemp('s')
  write(root, 'a', a)
  write(root, 'b', b, first=5000)
  built = make(root, {'a': 2, 'b': 1}, packing=packing)
  batch = built.batch(step)
  covered = 0
  for piece in built.contents(step):
    columns = slice(piece['column'], piece['column'] + piece['length'])
    tokens = built.document_tokens(piece['source'], piece['document'])
    np.testing.assert_array_equal(batch['targets'][piece['row'], columns],
                                  tokens[piece['start']:piece['start'] + piece['length']])
    assert piece['lineage']['file'] == f'{piece["source"]}.txt'
    assert piece['lineage']['position'] == piece['document']
    covered += piece['length']
    where = {'step': step, 'row': piece['row'], 'source': piece['source'],
             'document': piece['document'], 'epoch': piece['epoch'],
             'source_row': piece['source_row']}
    found = built.locate(f'{piece["source"]}:{piece["document"]}', epochs=piece['epoch'] + 1)
    assert where in found
    if step < 3:
      for at in found[:2]:
        assert any(p['document'] == at['document'] and p['row'] == at['row']
                   and p['source'] == at['source'] for p in built.contents(at['step']))
  assert covered == (batch['segment_ids'] > 0).sum()


def test_locate_by_hash_and_file(tmp_path):
  write(tmp_path, 'a', [5, 9, 3])
  built = make(tmp_path, 'a')
  piece = built.contents(4)[0]
  by_hash = built.locate(piece['lineage']['hash'], epochs=9)
  assert by_hash == built.locate(f'a:{piece["document"]}', epochs=9)
  assert {w['document'] for w in built.locate('a.txt')} == {0, 1, 2}
  with pytest.raises(ValueError, match="no document 'nowhere': give SOURCE:NUMBER .* sources a"):
    built.locate('nowhere')
  with pytest.raises(ValueError, match="'a:3' does not exist: 'a' holds documents 0 to 2"):
    built.locate('a:3')


def test_unpacked_rows_are_cut_and_say_so(tmp_path):
  write(tmp_path, 'a', [5, 11, 30])
  built = make(tmp_path, 'a', packing='none')
  described = built.describe()['sources']['a']
  assert (described['rows'], described['cut_tokens']) == (3, 3 + 22)
  assert make(tmp_path, 'a').describe()['sources']['a']['cut_tokens'] == 0
  rows = built.batch(0)['targets']
  assert sorted(map(tuple, rows.tolist())) == [
    (1, 2, 3, 4, 5, 0, 0, 0), tuple(range(6, 14)), tuple(range(17, 25))]


def test_attention_over_the_row_is_one_segment(tmp_path):
  write(tmp_path, 'a', [5, 3, 8, 8])
  apart, whole = (make(tmp_path, 'a', attention=a).batch(0) for a in ('document', 'row'))
  assert whole['segment_ids'].tolist() == np.ones((3, 8), int).tolist()
  assert whole['positions'].tolist() == [list(range(8))] * 3
  for name in ('inputs', 'targets', 'loss_weights'):
    np.testing.assert_array_equal(apart[name], whole[name])
  assert apart['segment_ids'].max() == 2


def test_no_rows_is_an_empty_batch(tmp_path):
  write(tmp_path, 'a', [4, 4])
  assert {v.shape for v in make(tmp_path, 'a').batch(0, rows=[]).values()} == {(0, 8)}


def test_bos_begins_every_document(tmp_path):
  write(tmp_path, 'a', [4, 4], bos_id=7)
  batch = make(tmp_path, 'a').batch(0)
  assert (batch['inputs'][:, [0, 4]] == 7).all()


def test_describe_rates_temperature_and_epochs(tmp_path):
  write(tmp_path, 'a', [8] * 9)
  write(tmp_path, 'b', [8] * 4)
  assert make(tmp_path, {'a': 9, 'b': 1}).describe()['phases'][0]['rows'] == {'a': 29, 'b': 3}
  hot = make(tmp_path, {'a': 9, 'b': 1}, temperature=2.0, changes=[(20, {'b': 1})])
  described = hot.describe(64)
  assert [p['rows'] for p in described['phases']] == [{'a': 24, 'b': 8}, {'a': 0, 'b': 32}]
  assert [p['first_row'] for p in described['phases']] == [0, 64]
  assert described['sources']['a']['epochs'] == 48 / 9
  assert described['sources']['b']['epochs'] == (16 + 128) / 4
  by_size = make(tmp_path, ['a', 'b'], period=13).describe()
  assert by_size['phases'][0]['rows'] == {'a': 9, 'b': 4}


def test_spec_and_fingerprint(tmp_path):
  write(tmp_path, 'a', [5, 9, 3])
  built = make(tmp_path, 'a')
  batch = built.batch(0)
  assert {k: (v.shape, v.dtype) for k, v in batch.items()} == built.spec
  same = make(tmp_path, {'a': 2.0})
  assert same.fingerprint == built.fingerprint
  changed = [dict(seed=1), dict(batch_size=4), dict(length=9), dict(packing='pack'),
             dict(attention='row'), dict(period=16)]
  assert len({make(tmp_path, 'a', **c).fingerprint for c in changed} | {same.fingerprint}) == 7


@pytest.mark.parametrize('kwargs, message', [
  (dict(batch_size=0), 'batch_size must be a whole number above 0, got 0'),
  (dict(length=-4), 'length must be a whole number above 0, got -4'),
  (dict(period=2.5), 'period must be a whole number above 0, got 2.5'),
  (dict(packing='packed'), "unknown packing 'packed'; allowed: concat, pack, none"),
  (dict(attention='all'), "unknown attention 'all'; allowed: document, row"),
  (dict(temperature=0), 'temperature must be above 0, got 0'),
  (dict(sources={}), 'sources must name at least one source'),
  (dict(sources=['a', 'a']), 'sources must name at least one source, each once'),
  (dict(sources={'ab': 1}), "unknown source: 'ab' .*did you mean '[ab]'"),
  (dict(sources={'a': 0}), 'no source has a positive rate'),
  (dict(sources={'a': 1, 'b': 1e-3}), "source 'b' with rate 0.001 would get 0 of the 32 rows"),
  (dict(split='test'), "unknown split of source 'a': 'test'"),
  (dict(changes=[(9, {'aa': 1})]), "unknown source 'aa'; did you mean 'a'"),
  (dict(changes=[(9, {'a': 1}), (9, {'a': 2})]), 'changes gives rates for step 9 twice'),
])
def test_bad_arguments_are_named(tmp_path, kwargs, message):
  write(tmp_path, 'a', [5, 9, 3])
  write(tmp_path, 'b', [5])
  with pytest.raises(ValueError, match=message):
    make(tmp_path, kwargs.pop('sources', 'a'), **kwargs)


def test_bad_steps_and_rows_are_named(tmp_path):
  write(tmp_path, 'a', [5])
  built = make(tmp_path, 'a')
  with pytest.raises(ValueError, match='step must be 0 or more, got -1'):
    built.batch(-1)
  with pytest.raises(ValueError, match='rows must lie in 0 to 2, got 1 to 3'):
    built.batch(0, rows=[1, 3])


def test_sources_of_different_vocabularies_are_refused(tmp_path):
  write(tmp_path, 'a', [5])
  write(tmp_path, 'b', [5], fingerprint='w')
  with pytest.raises(ValueError, match="'a' and 'b' were prepared with different vocabularies"):
    make(tmp_path, ['a', 'b'])


def test_memory_does_not_grow_with_steps_and_files_stay_bounded(tmp_path):
  names = [f's{i:03d}' for i in range(50)]
  for name in names:
    write(tmp_path, name, [200] * 20)
  built = make(tmp_path, names, batch_size=64, period=512)

  def resident():
    with open('/proc/self/statm') as file:
      return int(file.read().split()[1]) * os.sysconf('SC_PAGESIZE')

  for step in range(20):
    built.batch(step)
  before = resident()
  for step in range(20, 80):
    built.batch(step)
  assert resident() - before < 8 << 20
  assert len(os.listdir('/proc/self/fd')) < 200
