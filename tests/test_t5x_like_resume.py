"""Going on: with other data, another model, another seed, or nothing left to do."""

import os
import shutil

import optax
import pytest
import toy

from partitioning import mesh as mesh_lib
from partitioning import rules
from t5x_like import checkpoints, losses, metrics, prepare, report, resume, train
from t5x_like.data import loader as loader_lib
from t5x_like.data import sources, textfiles, texttasks


class Live(toy.Batches):
  """A loader with a position of its own, which it refuses to take from other data."""

  def __init__(self, seed):
    super().__init__(2, 8)
    self.fingerprint, self.position, self.restored = f'live {seed}', 0, []

  def batch(self, step, rows=None):
    self.position = step + 1
    return super().batch(step, rows)

  def state(self):
    return f'{self.fingerprint}, {self.position}'.encode()

  def restore(self, state):
    if not state.decode().startswith(self.fingerprint):
      raise ValueError('the state is not of these settings')
    self.restored.append(state.decode())


def settings(folder, **changes):
  base = dict(
      model=toy.model(layers=1), loss=losses.next_token, steps=3, loader=Live(0),
      optimizer=optax.sgd(1e-2), mesh=mesh_lib.make_mesh(devices=1), rules=rules.fsdp_tensor(),
      workdir=str(folder), log_every=1, writers=('jsonl',),
      checkpointer=checkpoints.Checkpointer(folder, every=9))
  return {**base, **changes}


def logged(folder):
  return [r['step'] for r in metrics.read_jsonl(os.path.join(folder, 'metrics.jsonl'))]


@pytest.fixture(scope='module')
def begun(tmp_path_factory):
  """A run of two updates of a live loader."""
  folder = tmp_path_factory.mktemp('resume') / 'run'
  train.train(**settings(folder, steps=2))
  return folder


def copied(begun, tmp_path):
  return shutil.copytree(begun, tmp_path / 'run')


def test_the_position_of_a_live_loader_is_restored_for_the_same_data_only(begun, tmp_path):
  same, other, store = Live(0), Live(1), toy.Batches(2, 8)
  for number, loader in enumerate((same, other, store)):
    folder, change = copied(begun, tmp_path / str(number)), 'allow' if number else 'refuse'
    assert train.train(**settings(folder, loader=loader, data_change=change))['step'] == 3
    assert logged(folder) == [1, 2, 3]
  assert same.restored == ['live 0, 2'] and other.restored == []
  with pytest.raises(ValueError, match='trained on other data.*data_change'):
    train.train(**settings(begun, loader=Live(1)))


def test_another_model_of_equal_shapes_is_refused_unless_allowed(begun, tmp_path):
  other = toy.model(layers=1, activation='gelu')
  with pytest.raises(ValueError, match="activation was 'silu', now 'gelu'; .*model_change = 'a"):
    train.train(**settings(begun, model=other))
  folder = copied(begun, tmp_path)
  assert train.train(**settings(folder, model=other, model_change='allow'))['step'] == 3


def test_how_a_model_is_executed_is_no_part_of_its_definition():
  plain = resume.definition(toy.model())
  assert plain == resume.definition(toy.model(layer_loop='scan', remat='full', kernel='reference'))
  assert plain != resume.definition(toy.model(norm_eps=1e-5))
  assert plain['class'] == 'DecoderLM'

  class Own:
    def build(self, rngs):
      raise NotImplementedError

  assert resume.definition(Own()) == {}


def test_another_seed_is_told(begun, tmp_path, capfd):
  train.train(**settings(copied(begun, tmp_path), seed=7))
  assert 'note: up to update 2 train.seed was 0, from here on it is 7' in capfd.readouterr().err


@pytest.mark.parametrize('steps', [1, 2])
def test_nothing_to_do_is_told_before_anything_is_compiled_or_written(
    begun, monkeypatch, capfd, steps):
  monkeypatch.setattr(train.step_lib, 'lower', None)  # Calling it would fail.
  before = {f: os.stat(begun / f).st_mtime_ns for f in os.listdir(begun) if f != '.train.lock'}
  assert train.train(**settings(begun, steps=steps))['step'] == 2
  assert f'already at update 2 of {steps}: nothing to do' in capfd.readouterr().err
  assert before == {f: os.stat(begun / f).st_mtime_ns for f in before}


def test_home_is_one_place_for_metrics_checkpoints_and_stores(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  (tmp_path / 'here').mkdir()
  monkeypatch.chdir(tmp_path / 'here')
  train.train(**settings('~/run', steps=1))
  assert {'1', 'metrics.jsonl', 'ledger.jsonl'} <= set(os.listdir(tmp_path / 'home' / 'run'))
  toy.write_store(str(tmp_path / 'home' / 'stores'))
  report.dry_run(workdir='~/run', store_dir='~/stores', source='toy')
  made = loader_lib.Loader(sources='toy', store_dir='~/stores', batch_size=2, length=8, seed=0)
  assert made.vocab_size == sources.vocabulary(sources='toy', store_dir='~/stores').vocab_size
  (tmp_path / 'a.txt').write_text('some text')
  task = texttasks.TextTask('t', textfiles.Text(str(tmp_path / 'a.txt')), validation_fraction=0.0)
  prepare.prepare(task=task, vocabulary='bytes', store_dir='~/stores', splits=('train',),
                  processes=1)
  assert os.path.isfile(tmp_path / 'home/stores/t/train/manifest.json')
  assert os.listdir(tmp_path / 'here') == []
