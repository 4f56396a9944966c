"""The token store: what was written is what is read, and damage is named."""

import hashlib
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_like.data import files as files_lib
from t5x_like.data import store

VOCABULARY = {'kind': 'test', 'fingerprint': 'v', 'vocab_size': 100, 'pad_id': 0, 'eos_id': 1,
              'bos_id': None}


def document(tokens, *, position=0, file='a.txt', **extra):
  return {'features': {'targets': tokens}, 'text_bytes': 3 * len(tokens), 'file': file,
          'position': position, 'hash': hashlib.md5(str((file, position)).encode()).digest(),
          **extra}


def write(path, shards, *, features=None, task='t', vocab_size=100):
  features = features or {'targets': vocab_size}
  infos = [store.write_shard(str(path), index=i, documents=docs, features=features)
           for i, docs in enumerate(shards)]
  return store.finish_store(str(path), shards=infos, features=features, task={'name': task},
                            vocabulary={**VOCABULARY, 'vocab_size': vocab_size})


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.lists(st.integers(1, 9), max_size=5), min_size=1, max_size=4).filter(
  lambda shards: any(shards)), vocab_size=st.sampled_from([100, 70000]))
def test_reads_back_what_was_written(tmp_path_factory, lengths, vocab_size):
  rng = np.random.default_rng(0)
  docs = [[document(rng.integers(0, vocab_size, n), position=j, file=f'{i}.txt')
           for j, n in enumerate(shard)] for i, shard in enumerate(lengths)]
  built = write(tmp_path_factory.mktemp('s'), docs, vocab_size=vocab_size)
  flat = [d for shard in docs for d in shard]
  assert built.num_documents == len(flat)
  assert built.tokens().dtype == (np.uint16 if vocab_size == 100 else np.uint32)
  np.testing.assert_array_equal(built.tokens()[:], np.concatenate(
    [d['features']['targets'] for d in flat]))
  for i, d in enumerate(flat):
    np.testing.assert_array_equal(built.document_tokens(i), d['features']['targets'])
    lineage = built.lineage(i)
    assert (lineage['file'], lineage['position']) == (d['file'], d['position'])
    assert lineage['hash'] == d['hash'].hex()
    assert built.find(lineage['hash']).tolist() == [i]
  assert built.text_bytes == built.byte_lengths.sum() == sum(d['text_bytes'] for d in flat)
  built.verify()


def test_fingerprint_depends_on_content_and_definition_only(tmp_path):
  docs = [[document([2, 3, 1])], [document([4, 1], position=1)]]
  first = write(tmp_path / 'a', docs)
  assert write(tmp_path / 'b', docs).fingerprint == first.fingerprint
  assert write(tmp_path / 'c', docs, task='other').fingerprint != first.fingerprint
  changed = [[document([2, 5, 1])], docs[1]]
  assert write(tmp_path / 'd', changed).fingerprint != first.fingerprint


def test_tags_and_empty_documents(tmp_path):
  built = write(tmp_path / 's', [[document([2, 1], tags={'licence': 'MIT'}), document([]),
                                  document([3, 1], position=2)]])
  assert built.num_documents == 2 and built.manifest['empty_documents'] == 1
  assert [built.lineage(i)['tags'] for i in (0, 1)] == [{'licence': 'MIT'}, {}]


def test_existing_shard_is_kept_unless_damaged_or_of_another_key(tmp_path):
  def shard(documents, key='k'):
    return store.write_shard(str(tmp_path), index=0, documents=documents,
                             features={'targets': 100}, key=key)

  def untouched():
    raise AssertionError('documents of a finished shard were read')
    yield

  info = shard([document([2, 1])])
  assert shard(untouched()) == info
  assert shard([document([3, 1])], key='other').sha256 != info.sha256
  again = shard([document([2, 1])])
  (tmp_path / 'shard-00000.targets.bin').write_bytes(b'\5\0\1\0')
  assert store.read_shard(str(tmp_path), index=0, key='k') is None
  assert shard([document([2, 1])]) == again


def test_failed_shard_leaves_nothing(tmp_path):
  with pytest.raises(ValueError, match=r'a\.txt, document 7, targets: token 100 is outside the '
                                       r'vocabulary of 100 tokens'):
    store.write_shard(str(tmp_path), index=0, features={'targets': 100},
                      documents=[document([2]), document([1, 100], position=7)])
  assert os.listdir(tmp_path) == []


def test_shards_must_be_complete(tmp_path):
  info = store.write_shard(str(tmp_path), index=1, documents=[document([2])],
                           features={'targets': 100})
  with pytest.raises(ValueError, match=r'shards must be 0 to n - 1, each once; got \[1\]'):
    store.finish_store(str(tmp_path), shards=[info], features={'targets': 100}, task={},
                       vocabulary=VOCABULARY)


def test_finished_store_is_immutable(tmp_path):
  write(tmp_path, [[document([2])]])
  with pytest.raises(ValueError, match='is a finished store and is never changed'):
    store.write_shard(str(tmp_path), index=0, documents=[], features={'targets': 100})


def test_store_without_documents_is_refused(tmp_path):
  with pytest.raises(ValueError, match='no document in any of 1 shards'):
    write(tmp_path, [[]])


def test_missing_and_unfinished_stores(tmp_path):
  with pytest.raises(ValueError, match='no token store at .*run prepare first'):
    store.Store(str(tmp_path / 'none'))
  store.write_shard(str(tmp_path), index=0, documents=[document([2])], features={'targets': 100})
  with pytest.raises(ValueError, match='is not a finished store: it has no manifest.json; rerun'):
    store.Store(str(tmp_path))


def test_damage_is_named(tmp_path):
  write(tmp_path, [[document([2, 3, 4])]])
  shard = tmp_path / 'shard-00000.targets.bin'
  shard.write_bytes(b'\2\0\3\0\5\0')
  with pytest.raises(ValueError, match=r'shard-00000\.targets\.bin is corrupted: its sha256'):
    store.Store(str(tmp_path)).verify()
  shard.write_bytes(b'\2\0\3\0')
  with pytest.raises(ValueError, match=r'shard-00000\.targets\.bin has 4 bytes, the manifest says '
                                       r'6: it is truncated .*rerun prepare'):
    store.Store(str(tmp_path))
  shard.unlink()
  with pytest.raises(ValueError, match=r'shard-00000\.targets\.bin is missing from the store'):
    store.Store(str(tmp_path))


def test_edited_manifest_is_refused(tmp_path):
  write(tmp_path, [[document([2, 3, 4])]], task='first')
  manifest = tmp_path / 'manifest.json'
  manifest.write_text(manifest.read_text().replace('"first"', '"second"'))
  with pytest.raises(ValueError, match='was changed after it was written'):
    store.Store(str(tmp_path))
  manifest.write_text('{')
  with pytest.raises(ValueError, match='manifest.json is damaged'):
    store.Store(str(tmp_path))


def test_unknown_source_names_the_nearest(tmp_path):
  write(tmp_path / 'wiki' / 'train', [[document([2])]])
  with pytest.raises(ValueError, match="unknown source: 'wikki' .*did you mean 'wiki'"):
    store.store_path(str(tmp_path), source='wikki', split='train')
  # What else lies there is no store: a lock, a cache, a store under way, mixtures.
  for name in ('.train.lock', '.inputs.json', 'baselines-0.json'):
    (tmp_path / 'wiki' / name).touch()
  for name in ('wiki/.trian.building', 'wiki/tria', 'mixtures', 'vocabularies'):
    (tmp_path / name).mkdir()
  with pytest.raises(ValueError, match="unknown split of source 'wiki': 'trian' in .*; did you "
                                       "mean 'train'\\? known: train; or run prepare"):
    store.store_path(str(tmp_path), source='wiki', split='trian')
  with pytest.raises(ValueError, match="unknown source: 'mixture' in .*; known: wiki; or run"):
    store.store_path(str(tmp_path), source='mixture', split='train')
  with pytest.raises(ValueError, match='does not exist: run prepare first'):
    store.store_path(str(tmp_path / 'no'), source='wiki', split='train')


def test_open_files_are_bounded(tmp_path):
  files = files_lib.Files(max_open=4)
  stores = [store.Store(write(tmp_path / str(i), [[document([i + 2, 1])]] * 3).path, files=files)
            for i in range(8)]
  before = len(os.listdir('/proc/self/fd'))
  for i, s in enumerate(stores):
    np.testing.assert_array_equal(s.tokens()[:], [i + 2, 1] * 3)
    assert s.offsets()[-1] == 6
  assert len(files) <= 4
  assert len(os.listdir('/proc/self/fd')) <= before + 8


def test_mapped_bytes_are_bounded(tmp_path):
  files = files_lib.Files(max_mapped=100)
  for i in range(3):
    path = tmp_path / str(i)
    path.write_bytes(bytes(80))
    assert files.table(str(path), dtype=np.int64).shape == (10,)
  assert len(files) == 1
