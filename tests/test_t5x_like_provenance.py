"""A run remembers its stores: what reads it through others is refused, and none is replaced."""

import json
import os
import pathlib
import shutil
from typing import Any

import pytest
import toy

from partitioning import mesh as mesh_lib
from partitioning import rules
from t5x_like import (
  checkpoints,
  evaluate,
  generate,
  inspect,
  losses,
  optim,
  prepare,
  provenance,
  train,
)
from t5x_like.data import eval_loader, loader, textfiles, texttasks, vocabularies

MODEL = toy.model(vocab=260, layers=1)


def data(stores, **changes) -> Any:
  return loader.Loader(**{'sources': 'toy', 'store_dir': stores, 'batch_size': 4, 'length': 16,
                          'seed': 0, **changes})


def held_out(stores, source='toy'):
  return eval_loader.EvalLoader(sources=source, store_dir=stores, batch_size=4, length=16,
                                max_batches=2)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A run of one update, and the folder of stores it read."""
  folder = tmp_path_factory.mktemp('provenance')
  stores, workdir = toy.write_store(str(folder / 'stores')), str(folder / 'run')
  train.train(model=MODEL, loader=data(stores), loss=losses.next_token, steps=1, workdir=workdir,
              optimizer=optim.adamw(learning_rate=1e-2), mesh=mesh_lib.make_mesh(devices=1),
              rules=rules.fsdp_tensor(), writers=('jsonl',),
              checkpointer=checkpoints.Checkpointer(workdir, every=1))
  return workdir, stores


@pytest.fixture
def rebuilt(run, tmp_path):
  """The same folder of stores after other text was prepared in it."""
  other = str(tmp_path / 'stores')
  shutil.copytree(run[1], other)
  shutil.rmtree(os.path.join(other, 'toy'))
  return toy.write_store(other, seed=1)


def use(workdir) -> dict[str, Any]:
  return dict(model=MODEL, mesh=mesh_lib.make_mesh(devices=1), rules=rules.fsdp_tensor(),
              checkpoint=workdir)


def test_a_run_says_what_it_was_trained_on(run):
  workdir, stores = run
  known = json.loads(pathlib.Path(workdir, 'data.json').read_text())
  assert known['fingerprint'] == data(stores).fingerprint
  assert known['vocabulary'] == vocabularies.ByteVocabulary().fingerprint()
  assert known['stores'] == {'toy': {
    'train': data(stores).stores['toy'].fingerprint,
    'validation': held_out(stores).stores['toy'].fingerprint}}


def test_evaluation_takes_the_store_of_the_run_and_refuses_what_replaced_it(run, rebuilt):
  workdir, stores = run
  assert evaluate.evaluate(**use(workdir), loader=held_out(stores))['tokens'] > 0
  then, now = (held_out(s).stores['toy'].fingerprint[:12] for s in (stores, rebuilt))
  with pytest.raises(ValueError, match=f'toy/validation is not the one this run was trained with: '
                                       f'its fingerprint is {now}, but .*data.json says {then}.*'
                                       f'set STORE_DIR and SOURCES'):
    evaluate.evaluate(**use(workdir), loader=held_out(rebuilt))


def test_text_the_run_has_not_read_may_be_evaluated_if_the_vocabulary_is_its_own(run, tmp_path):
  workdir, _ = run
  other = toy.write_store(str(tmp_path / 'other'), source='elsewhere', seed=2)
  provenance.check(workdir, loader=held_out(other, 'elsewhere'))
  wider = vocabularies.ByteVocabulary(extra_ids=1)
  strange = held_out(other, 'elsewhere')
  strange.vocabulary = lambda: wider  # pyright: ignore
  with pytest.raises(ValueError, match=f'the vocabulary is not .*{wider.fingerprint()[:12]}'):
    provenance.check(workdir, loader=strange)


def test_inspection_refuses_a_store_that_was_replaced(run, rebuilt):
  workdir, stores = run
  assert inspect.inspect(loader=data(stores), step=0, workdir=workdir)
  assert inspect.inspect(loader=data(rebuilt), step=0)
  with pytest.raises(ValueError, match='toy/train is not the one this run was trained with'):
    inspect.inspect(loader=data(rebuilt), step=0, workdir=workdir)


def test_generation_refuses_another_vocabulary(run):
  workdir, _ = run
  assert generate.generate(**use(workdir), vocabulary=vocabularies.ByteVocabulary(), new_tokens=2)
  for checkpoint in (workdir, os.path.join(workdir, '1')):
    with pytest.raises(ValueError, match='the vocabulary is not the one this run was trained with'):
      generate.generate(**use(checkpoint), vocabulary=vocabularies.ByteVocabulary(extra_ids=1))


def test_a_run_without_the_record_is_taken_as_it_is_and_a_damaged_one_is_named(run, tmp_path):
  provenance.check(tmp_path, loader=data(run[1]))
  (tmp_path / 'data.json').write_text('{"stores": ')
  with pytest.raises(ValueError, match='data.json is damaged .* remove it'):
    provenance.check(tmp_path, loader=data(run[1]))


def prepared(folder, **settings):
  task = texttasks.TextTask('notes', source=textfiles.Text(str(folder / 'in')),
                            validation_fraction=0.3)
  return prepare.prepare(**{'task': task, 'store_dir': str(folder / 'stores'), 'processes': 1,
                            'vocabulary': 'bytes', 'naming': 'content', **settings})


def test_stores_named_by_content_stay_when_the_text_changes(tmp_path, capsys):
  (tmp_path / 'in').mkdir()
  for i in range(20):
    (tmp_path / 'in' / f'{i}.txt').write_text(f'Note {i}.')
  first = prepared(tmp_path)
  name = capsys.readouterr().out.strip()
  assert set(first) == {f'{name}/train', f'{name}/validation'} and name.startswith('notes.')
  assert set(prepared(tmp_path)) == set(first) and 'reused' in capsys.readouterr().err
  (tmp_path / 'in' / '3.txt').write_text('Another note.')
  second = prepared(tmp_path)
  third = prepared(tmp_path, vocabulary=vocabularies.ByteVocabulary(extra_ids=1))
  assert len({*first, *second, *third}) == 6
  again = loader.Loader(sources=name, store_dir=str(tmp_path / 'stores'), batch_size=1, length=8,
                        seed=0)
  assert again.stores[name].fingerprint == first[f'{name}/train'].fingerprint


def test_naming_by_content_says_where_it_cannot_be(tmp_path):
  (tmp_path / 'in').mkdir()
  (tmp_path / 'in' / 'a.txt').write_text('A note.')
  (tmp_path / 'in' / 'b.txt').write_text('Another.')
  task = texttasks.TextTask('notes', source=textfiles.Text(str(tmp_path / 'in')))
  with pytest.raises(ValueError, match="naming='content' is for text tasks alone.*in a mixture"):
    prepared(tmp_path, task=texttasks.Mixture('both', tasks=[task], rates=[1]))
  with pytest.raises(ValueError, match="naming='hash' is unknown; allowed: 'plain', 'content'"):
    prepared(tmp_path, naming='hash')
