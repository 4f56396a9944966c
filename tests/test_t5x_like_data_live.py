"""The live adapter: batches as a store gives them, and resuming continues the very same stream."""

import itertools
import os
import shutil
import signal
from typing import Any

import numpy as np
import pytest
import seqio
import tensorflow as tf
import toy

from partitioning import mesh as mesh_lib
from partitioning import rules
from t5x_like import checkpoints, losses, metrics, optim, train
from t5x_like.data import live, tasks, textfiles

# TensorFlow's AutoGraph on Python 3.13, which would give up on a function that warns.
pytestmark = pytest.mark.filterwarnings(
  'ignore:.*got an unexpected keyword argument:DeprecationWarning')


def register(name, dataset_fn, *, features, preprocessors=()):
  source: Any = seqio.FunctionDataSource(dataset_fn, splits=['train'])
  seqio.TaskRegistry.add(
    name, source=source,
    preprocessors=[*preprocessors, seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
    output_features={f: seqio.Feature(seqio.ByteVocabulary(), add_eos=f == 'targets')
                     for f in features})


def numbers(split, shuffle_files):
  del split, shuffle_files
  columns: Any = {'targets': [f'number {i}' for i in range(50)]}
  return tf.data.Dataset.from_tensor_slices(columns)


@seqio.map_over_dataset(num_seeds=1)
def noise(example, seed):
  drawn = tf.random.stateless_uniform([], seed, 0, 1000, tf.int32)
  return {'targets': example['targets'] + ' ' + tf.strings.as_string(drawn)}


def pairs(split, shuffle_files):
  del split, shuffle_files
  columns: Any = {'inputs': ['ab', 'c'], 'targets': ['xyz', 'w']}
  return tf.data.Dataset.from_tensor_slices(columns)


@pytest.fixture(scope='module', autouse=True)
def registered(tmp_path_factory):
  register('live_noise', numbers, features=['targets'], preprocessors=[noise])
  register('live_pairs', pairs, features=['inputs', 'targets'])
  folder = tmp_path_factory.mktemp('in')
  for i in range(30):
    (folder / f'{i}.txt').write_text(f'file {i}')
  tasks.text_task('live_text', source=textfiles.Text(str(folder)), vocabulary='bytes')
  seqio.MixtureRegistry.add('live_mixture', [('live_noise', 1), ('live_text', 2)])


def loader(task='live_mixture', **changes):
  return live.LiveLoader(**{'task': task, 'batch_size': 2, 'length': 40, 'seed': 3, **changes})


def equal(a, b):
  return set(a) == set(b) and all(np.array_equal(a[k], b[k]) for k in a)


def test_batches_follow_the_convention():
  data = loader()
  found = data.batch(0)
  assert {k: (v.shape, v.dtype) for k, v in found.items()} == data.spec
  assert found['segment_ids'].max() > 1 and found['loss_weights'].sum() > 40
  for row in range(2):
    inputs, targets, segments, positions = (
      found[k][row] for k in ('inputs', 'targets', 'segment_ids', 'positions'))
    np.testing.assert_array_equal(found['loss_weights'][row], segments > 0)
    for i, segment in itertools.takewhile(lambda x: x[1] > 0, enumerate(segments)):
      starts = i == 0 or segments[i - 1] != segment
      assert inputs[i] == (0 if starts else targets[i - 1])
      assert positions[i] == (0 if starts else positions[i - 1] + 1)
  assert equal(data.batch(0, rows=[1]), {k: v[1:] for k, v in found.items()})


def test_restored_loader_gives_the_same_stream():
  whole = loader()
  expected = [whole.batch(i) for i in range(40)]
  assert not equal(expected[0], expected[1])
  first = loader()
  for i in range(9):
    assert equal(first.batch(i), expected[i])
  state = first.state()
  for behind in (0, 3):
    resumed = loader()
    resumed.restore(state)
    for i in range(9 - behind, 40):
      assert equal(resumed.batch(i), expected[i])


def test_restoring_reads_no_batch_again(capsys):
  first = loader()
  first.batch(0)
  for i in range(12):
    first.batch(i)
  capsys.readouterr()
  resumed = loader()
  resumed.restore(first.state())
  resumed.batch(12)
  assert capsys.readouterr().err == ''


def test_any_step_is_reached_by_replaying(capsys):
  data = loader()
  expected = [data.batch(i) for i in range(12)]
  assert equal(data.batch(2), expected[2])
  assert equal(data.batch(11), expected[11])
  assert equal(loader().batch(11), expected[11])
  assert "live data of 'live_mixture': replaying 8 batches" in capsys.readouterr().err


def test_pipeline_that_cannot_be_saved_is_replayed(capsys):
  def generated(split, shuffle_files):
    del split, shuffle_files
    return tf.data.Dataset.from_generator(
      lambda: ({'targets': f'g{i}'} for i in range(30)),
      output_signature={'targets': tf.TensorSpec([], tf.string)})

  register('live_generated', generated, features=['targets'])
  whole = loader('live_generated')
  expected = [whole.batch(i) for i in range(8)]
  first = loader('live_generated')
  for i in range(5):
    first.batch(i)
  state = first.state()
  assert 'cannot save its position' in capsys.readouterr().err
  resumed = loader('live_generated')
  resumed.restore(state)
  assert all(equal(resumed.batch(i), expected[i]) for i in range(5, 8))


def test_inputs_are_a_prefix_without_loss():
  found = loader('live_pairs', length=12, input_length=4, packing='none').batch(0)
  byte = seqio.ByteVocabulary()
  rows = sorted(found['targets'][:, :8].tolist())
  assert rows == sorted([[*byte.encode(t), 1] + [0] * (7 - len(t)) for t in ('abxyz', 'cw')])
  assert sorted(found['loss_weights'].sum(1).tolist()) == [2, 4]
  assert sorted(found['segment_ids'].sum(1).tolist()) == [3, 6]
  assert found['positions'].max() == 5


def test_a_run_stopped_and_started_again_has_the_losses_of_one_that_was_not(tmp_path, capsys):
  class Stop:
    def due(self, step, *, last):
      return step == 3

    def __call__(self, run, step, train_state):
      os.kill(os.getpid(), signal.SIGTERM)

  def trained(name, **settings):
    folder = str(tmp_path / name)
    train.train(model=toy.model(vocab=259, layers=1), loader=loader(), steps=6, workdir=folder,
                loss=losses.next_token, optimizer=optim.adamw(learning_rate=1e-2),
                mesh=mesh_lib.make_mesh(devices=1), rules=rules.fsdp_tensor(), log_every=1,
                writers=('jsonl',), checkpointer=checkpoints.Checkpointer(folder, every=2),
                **settings)

  def curve(name):
    return metrics.column(metrics.read_jsonl(str(tmp_path / name / 'metrics.jsonl')), 'loss')

  trained('whole')
  with pytest.raises(SystemExit):
    trained('stopped', hooks=[Stop()])
  done = checkpoints.Checkpointer(tmp_path / 'stopped', every=1).steps()[-1]
  assert done in (3, 4)
  capsys.readouterr()
  trained('stopped')
  assert 'replaying' not in capsys.readouterr().err
  assert curve('stopped') == curve('whole') and curve('whole')[0] == [1, 2, 3, 4, 5, 6]
  # From the checkpoint of update 2 as well, as after a kill: those after it are gone.
  for later in range(3, 7):
    shutil.rmtree(tmp_path / 'stopped' / str(later), ignore_errors=True)
  trained('stopped')
  assert curve('stopped') == curve('whole')


def test_other_settings_are_refused():
  data = loader()
  data.batch(0)
  with pytest.raises(ValueError, match="not of 'live_mixture' with these settings"):
    loader(seed=4).restore(data.state())
  with pytest.raises(ValueError, match='state of the live data is damaged'):
    data.restore(b'{}')
  with pytest.raises(ValueError, match="has no split 'test'; it has: train"):
    loader('live_noise', split='test')
  with pytest.raises(ValueError, match="did you mean 'live_text'"):
    loader('live_txt')
  with pytest.raises(ValueError, match='input_length=4 would have no effect'):
    loader(input_length=4)


def test_describes_itself():
  data = loader()
  assert data.describe()['rates'] == {'live_noise': 1.0, 'live_text': 2.0}
  assert data.vocab_size == 259 and data.eos_id == 1 and data.bos_id == 0
