"""Held-out documents: chosen by content, and at least one of several is held out and one is not."""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_like import prepare
from t5x_like.data import store, textfiles, texttasks, vocabularies


def task(folder, fraction, **source):
  return texttasks.TextTask('t', textfiles.Text(str(folder), **source),
                            vocabulary=vocabularies.ByteVocabulary(), validation_fraction=fraction)


def split(made):
  """The texts of each split."""
  parts = [textfiles.Part(file) for file in made.files()]
  return [sorted(d.texts['targets'] for _, d in made.read(
    parts, split=name, moved=made.division().moved, skipped=[]))
    for name in ('train', 'validation')]


@settings(max_examples=60, deadline=None)
@given(names=st.lists(st.integers(0, 60), min_size=2, max_size=40),
       fraction=st.sampled_from([1e-9, 0.01, 0.05, 0.5, 0.97, 1 - 1e-9]))
def test_both_splits_have_a_document_and_no_other_moves(tmp_path_factory, names, fraction):
  folder = tmp_path_factory.mktemp('in')
  for i, name in enumerate(names):
    (folder / f'{i:02d}.txt').write_text(f'Text {name}.')
  train, held_out = split(task(folder, fraction))
  assert sorted(train + held_out) == sorted(f'Text {n}.' for n in names)
  assert not set(train) & set(held_out)  # Copies stay together.
  by_hash = {f'Text {n}.': textfiles.split_of(
    textfiles.document({'targets': f'Text {n}.'}, 0).hash, fraction) for n in names}
  moved = {t for t in train if by_hash[t] != 'train'} | {
    t for t in held_out if by_hash[t] != 'validation'}
  if len(set(names)) == 1:
    assert not moved and not (train and held_out)
  else:
    assert train and held_out
    assert len(moved) == (0 if len(set(by_hash.values())) == 2 else 1)


def test_the_split_of_a_larger_corpus_is_that_of_its_hashes(tmp_path):
  for i in range(300):
    (tmp_path / f'{i}.txt').write_text(f'Document {i}.')
  made = task(tmp_path, 0.05)
  assert made.division() == texttasks.Division(None, 2)
  train, held_out = split(made)
  # As every earlier version divided them.
  names = hashlib.sha256('\n'.join(held_out).encode()).hexdigest()[:16]
  assert (len(train), len(held_out), names) == (282, 18, '83cc11ee510b6e50')
  assert [u.key for u in made.units('train')] == [[(f.name, 0, None) for f in made.files()]]


def test_few_documents_become_both_stores(tmp_path):
  folder = tmp_path / 'in'
  folder.mkdir()
  for i in range(3):
    (folder / f'{i}.txt').write_text(f'Document {i}.')
  made = task(folder, 1e-6)
  out = str(tmp_path / 'out')
  stores = prepare.prepare(task=made, store_dir=out, processes=1)
  assert [stores[f't/{s}'].num_documents for s in made.splits] == [2, 1]
  # With more text another document may be the one, so these stores are of another definition.
  moved = stores['t/train'].manifest['task']['moved']
  assert moved == stores['t/validation'].lineage(0)['hash']
  for i in range(3, 12):
    (folder / f'{i}.txt').write_text(f'Document {i}.')
  after = task(folder, 1e-6).division().moved
  assert after is not None and after.hex() != moved
  with pytest.raises(ValueError, match=f"moved was '{moved}', now '{after.hex()}'"):
    prepare.prepare(task=made, store_dir=out, processes=1)
  stores = prepare.prepare(task=made, store_dir=out, processes=1, existing='rebuild')
  assert [stores[f't/{s}'].num_documents for s in made.splits] == [11, 1]


def test_one_document_is_refused_before_anything_is_written(tmp_path):
  for name in ('a.txt', 'copy.txt'):
    (tmp_path / name).write_text('The only one.\n\nReally.')
  out = tmp_path / 'out'
  with pytest.raises(ValueError, match=r"task 't' is one document \(a.txt, copy.txt\).*cut it with "
                                       r"a separator, such as .* = '\\n\\n', or set validation_fr"):
    prepare.prepare(task=task(tmp_path, 0.05), store_dir=str(out), processes=1)
  assert not out.exists()
  stores = prepare.prepare(task=task(tmp_path, 0.05, separator='\n\n'), processes=1,
                           store_dir=str(out))
  assert sorted(s.num_documents for s in stores.values()) == [2, 2]


def test_without_held_out_documents_only_the_train_store_is_written(tmp_path):
  (tmp_path / 'a.txt').write_text('The only one.')
  stores = prepare.prepare(task=task(tmp_path, 0.0), store_dir=str(tmp_path / 'o'), processes=1)
  assert list(stores) == ['t/train']
  prepare.dry_run(task=task(tmp_path, 0.0), store_dir=str(tmp_path / 'o'))
  with pytest.raises(ValueError, match="has no split 'validation'; it has: train"):
    prepare.prepare(task=task(tmp_path, 0.0), store_dir=str(tmp_path / 'o'), processes=1,
                    splits=('train', 'validation'))
  with pytest.raises(ValueError, match="unknown split of source 't': 'validation' .*known: train"):
    store.store_path(str(tmp_path / 'o'), source='t', split='validation')
