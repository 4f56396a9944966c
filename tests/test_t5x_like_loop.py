"""What the loop does when something goes wrong between updates: hooks, disks, numbers."""

import os
import resource
import shutil

import jax
import optax
import pytest
import toy

from partitioning import mesh as mesh_lib
from partitioning import rules
from t5x_like import checkpoints, decode, failures, losses, metrics, train


def settings(folder, **changes):
  """The arguments of the smallest run there is."""
  base = dict(
      model=toy.model(layers=1), loss=losses.next_token, steps=3, loader=toy.Batches(2, 8),
      optimizer=optax.sgd(1e-2), mesh=mesh_lib.make_mesh(devices=1), rules=rules.fsdp_tensor(),
      workdir=str(folder), log_every=1, writers=('jsonl',),
      checkpointer=checkpoints.Checkpointer(folder, every=2))
  return {**base, **changes}


def saved(folder):
  return checkpoints.Checkpointer(folder, every=1).steps()


class Failing:
  """A hook that fails after an update."""

  def __init__(self, at):
    self.at = at

  def due(self, step, *, last):
    return step == self.at

  def __call__(self, run, step, train_state):
    raise RuntimeError('no scores today')


def test_a_failing_hook_loses_no_update(tmp_path, capfd):
  with pytest.raises(RuntimeError, match='no scores today'):
    train.train(**settings(tmp_path, hooks=[Failing(at=1)]))
  assert saved(tmp_path) == [1]
  assert 'Failing failed after update 1; the state is saved' in capfd.readouterr().err
  with pytest.raises(RuntimeError, match='no scores today'):
    train.train(**settings(tmp_path, hooks=[Failing(at=3)]))
  assert saved(tmp_path)[-1] == 3
  records = metrics.read_jsonl(str(tmp_path / 'metrics.jsonl'))
  assert [r['step'] for r in records] == [1, 2, 3]


def test_a_run_whose_last_state_cannot_be_saved_fails(tmp_path, capfd):
  class Fill:
    def due(self, step, *, last):
      return last

    def __call__(self, run, step, train_state):
      shutil.rmtree(tmp_path / 'runs')
      (tmp_path / 'runs').write_text('a file where the directory should be')

  with pytest.raises(OSError, match='state after update 1 is not saved, tried twice: .*complete '
                                    'checkpoints there: none'):
    train.train(**settings(tmp_path / 'work', steps=1, hooks=[Fill()],
                           checkpointer=checkpoints.Checkpointer(tmp_path / 'runs/a', every=9)))


def test_a_full_disk_at_the_last_save_is_tried_again(tmp_path, capfd):
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  state = {'w': jax.random.normal(jax.random.key(0), (100_000,))}
  with checkpoints.Checkpointer(tmp_path, every=1) as saver:
    save, limits = saver.save, [100_000, soft]

    def limited(*args, **settings):
      resource.setrlimit(resource.RLIMIT_FSIZE, (limits.pop(0), hard))
      return save(*args, **settings)

    saver.save = limited
    try:
      saver.finish(1, state, extra={})
      assert saved(tmp_path) == [1] and not limits
      assert capfd.readouterr().err.count('was NOT saved') == 1
      limits = [100_000, 100_000]
      with pytest.raises(OSError, match=r'update 2 is not saved.*there: \[1\]'):
        saver.finish(2, state, extra={})
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def poisoned(at):
  """Descends, but for NaN at one update."""
  def update(updates, state, params=None):
    del params
    rate = jax.numpy.where(state == at - 1, jax.numpy.nan, -1e-2)
    return jax.tree.map(lambda g: rate * g, updates), state + 1
  return optax.GradientTransformation(lambda params: jax.numpy.zeros((), jax.numpy.int32), update)


@pytest.mark.parametrize('at', [2, 3])
def test_parameters_that_are_no_numbers_are_never_saved(tmp_path, at):
  with pytest.raises(FloatingPointError) as error:
    train.train(**settings(tmp_path, optimizer=poisoned(at)))
  assert f'parameters after update {at} is nan' in str(error.value)
  assert f'--step {at - 1};' in str(error.value)
  assert saved(tmp_path) == ([] if at == 2 else [2])
  last = metrics.read_jsonl(str(tmp_path / 'metrics.jsonl'))[-1]
  assert last['step'] == at and last['loss'] > 0


def test_divergence_is_told_without_a_traceback(capsys):
  try:
    raise FloatingPointError('the loss of update 1 is nan')
  except FloatingPointError as error:
    assert failures.report(error, show='short', ours=frozenset()) == 2
  assert capsys.readouterr().err == 'error: the loss of update 1 is nan\n'


def test_samples_of_a_model_without_a_cache_are_refused_before_anything_is_written(tmp_path):
  class Uncached:
    def __init__(self, model):
      self.build = model.build

  folder = tmp_path / 'run'
  with pytest.raises(ValueError, match='decode.Samples needs Uncached.empty_cache.*HOOKS'):
    train.train(**settings(folder, model=Uncached(toy.model(layers=1)), hooks=[decode.Samples()],
                           checkpointer=None))
  assert not os.path.exists(folder)
