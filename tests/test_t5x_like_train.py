"""The loop: resumes bit for bit, stops when told, refuses what does not fit, golden curve."""

import json
import os
import signal
import threading

import jax
import numpy as np
import pytest
import toy

from partitioning import mesh as mesh_lib
from partitioning import rules
from t5x_like import checkpoints, evaluate, losses, metrics, optim, train
from t5x_like.data import eval_loader, loader
from t5x_like.hooks import Run

STEPS = 6


def settings(folder, **changes):
  """The arguments of a tiny run on a real store."""
  stores = os.path.join(os.path.dirname(folder), 'stores')
  if not os.path.isdir(stores):
    toy.write_store(stores)
  base = dict(
      model=toy.model(vocab=259, layers=1, dropout=0.1), loss=losses.next_token, steps=STEPS,
      loader=loader.Loader(sources='toy', store_dir=stores, batch_size=4, length=16, seed=0,
                           packing='pack'),
      optimizer=optim.adamw(learning_rate=1e-2), mesh=mesh_lib.make_mesh(devices=1),
      rules=rules.fsdp_tensor(), workdir=str(folder), log_every=1, writers=('jsonl',),
      checkpointer=checkpoints.Checkpointer(folder, every=2))
  return {**base, **changes}


def curve(folder):
  return metrics.column(metrics.read_jsonl(os.path.join(folder, 'metrics.jsonl')), 'loss')


def final(folder, described):
  return checkpoints.load_params(folder, described.shapes)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """One uninterrupted run."""
  folder = tmp_path_factory.mktemp('train') / 'whole'
  folder.mkdir()
  result = train.train(**settings(folder))
  return folder, result


def test_a_run_leaves_what_it_promises(whole):
  folder, result = whole
  assert result['step'] == STEPS
  steps, values = curve(folder)
  assert steps == list(range(1, STEPS + 1)) and values[-1] < values[0]
  assert {'6', '4', 'ledger.jsonl', 'metrics.jsonl', 'model-info.txt'} <= set(os.listdir(folder))
  ledger = result['ledger']['seconds']
  assert ledger['productive'] > 0 and ledger['compile'] > 0


def test_resuming_from_any_checkpoint_is_bit_identical(whole, tmp_path):
  folder, _ = whole
  described = toy.structure(toy.model(vocab=259, layers=1, dropout=0.1))
  part = tmp_path / 'part'
  part.mkdir()
  (tmp_path / 'stores').symlink_to(folder.parent / 'stores')
  train.train(**settings(part, steps=3))
  train.train(**settings(part))
  assert curve(part) == curve(folder)
  assert toy.tree_equal(final(part, described), final(folder, described))


def test_a_finished_run_does_nothing_more(whole, capsys):
  folder, result = whole
  again = train.train(**settings(folder))
  assert again['step'] == STEPS
  assert curve(folder)[0] == list(range(1, STEPS + 1))


def test_sigterm_saves_and_exits_and_the_run_goes_on(whole, tmp_path):
  folder, _ = whole
  part = tmp_path / 'part'
  part.mkdir()
  (tmp_path / 'stores').symlink_to(folder.parent / 'stores')

  class Terminate:
    def due(self, step, *, last):
      return step == 3

    def __call__(self, run, step, train_state):
      os.kill(os.getpid(), signal.SIGTERM)

  assert threading.current_thread() is threading.main_thread()
  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(SystemExit) as stopped:
    train.train(**settings(part, hooks=[Terminate()]))
  assert stopped.value.code == train.STOPPED
  assert signal.getsignal(signal.SIGTERM) is before
  assert checkpoints.Checkpointer(part, every=1).steps()[-1] in (3, 4)
  train.train(**settings(part))
  assert curve(part) == curve(folder)


def test_a_second_run_in_the_same_folder_is_refused_and_changes_nothing(whole, tmp_path):
  part = tmp_path / 'part'
  (tmp_path / 'stores').symlink_to(whole[0].parent / 'stores')
  part.mkdir()

  class Intruder:
    def due(self, step, *, last):
      return step == 1

    def __call__(self, run, step, train_state):
      before = (part / 'metrics.jsonl').read_text()
      elsewhere = settings(part, workdir=str(tmp_path / 'other'))
      for second in (settings(part, checkpointer=None), elsewhere):
        with pytest.raises(ValueError, match=f'part is in use by process {os.getpid()} on'):
          train.train(**second)
      assert (part / 'metrics.jsonl').read_text() == before

  train.train(**settings(part, steps=1, hooks=[Intruder()]))
  assert curve(part)[0] == [1]


def test_state_restores_onto_another_mesh(whole, tmp_path):
  folder, _ = whole
  definition = toy.model(vocab=259, layers=1, dropout=0.1)
  described = toy.structure(definition, data=2, fsdp=2, tensor=1)
  one = final(folder, toy.structure(definition))
  other = final(folder, described)
  assert toy.tree_equal(one, other)
  assert other['embed']['embedding'].sharding.mesh.size == 4


def test_weights_alone_start_another_run(whole, tmp_path):
  folder, _ = whole
  new = tmp_path / 'new'
  new.mkdir()
  (tmp_path / 'stores').symlink_to(folder.parent / 'stores')
  train.train(**settings(new, initial=str(folder), steps=1, checkpointer=None))
  assert curve(new)[1][0] < curve(folder)[1][0] - 0.2


def test_evaluation_agrees_with_the_loss_written_out(whole, tmp_path):
  folder, _ = whole
  definition = toy.model(vocab=259, layers=1, dropout=0.1)
  stores = str(folder.parent / 'stores')
  held_out = eval_loader.EvalLoader(sources='toy', store_dir=stores, batch_size=4, length=16)
  found = evaluate.evaluate(
      model=definition, mesh=mesh_lib.make_mesh(devices=1), rules=rules.fsdp_tensor(),
      loader=held_out, checkpoint=str(folder), workdir=str(tmp_path))
  described = toy.structure(definition)
  params = final(folder, described)
  apply = jax.jit(lambda p, b: described.module(p)(
      b['inputs'], positions=b['positions'], segment_ids=b['segment_ids']))
  total = 0.0
  for i in range(len(held_out)):
    batch = held_out.batch(i)
    log_p = jax.nn.log_softmax(apply(params, batch), -1)
    picked = np.take_along_axis(np.asarray(log_p), batch['targets'][..., None], -1)[..., 0]
    total -= float((picked * batch['loss_weights']).sum())
  assert found['bits_per_byte'] == pytest.approx(total / np.log(2) / held_out.bytes, 1e-5)
  assert found['tokens'] == held_out.tokens
  assert json.loads((tmp_path / 'evaluation.json').read_text())['loss'] == found['loss']
  held_out.bytes = None  # As of a store that does not say how many bytes its targets are.
  messages, hook = [], evaluate.Perplexity(loader=held_out, every=0)
  hook(Run(definition, described, None, str(tmp_path), 1, lambda *_: None, messages.append), 1,
       {'params': params})
  assert 'bits per byte unknown (the store does not say' in messages[0]
  silent = json.loads((tmp_path / 'evaluation.json').read_text())
  assert (silent['split'], silent['sources']) == ('validation', ['toy'])
  assert set(found) - set(silent) == {'bits_per_byte', 'bytes'} and silent['loss'] == found['loss']


@pytest.mark.parametrize('changes, text', [
    ({'steps': 0}, 'steps=0'),
    ({'ema': 1.0}, r'ema=1.0 must be in \(0, 1\)'),
    ({'model': toy.model(vocab=200)}, r'token ids up to 258 but the model has vocab=200'),
    ({'microbatches': 3}, 'does not divide into 3 microbatches'),
    ({'workdir': 'gs://bucket/a'}, "workdir='gs://bucket/a' is an address"),
])
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(
    whole, tmp_path, changes, text):
  stores = str(whole[0].parent / 'stores')
  (tmp_path / 'stores').symlink_to(stores)
  with pytest.raises(ValueError, match=text):
    train.train(**settings(tmp_path / 'bad', checkpointer=None, **changes))
  assert not (tmp_path / 'bad').exists()
  with pytest.raises(ValueError, match=text):
    train.dry_run(**settings(tmp_path / 'bad', checkpointer=None, **changes))


def test_other_data_is_refused_on_resume_unless_allowed(whole):
  folder, _ = whole
  stores = str(folder.parent / 'stores')
  other = loader.Loader(sources='toy', store_dir=stores, batch_size=4, length=16, seed=1)
  with pytest.raises(ValueError, match='trained on other data or another order.*train.initial'):
    train.train(**settings(folder, loader=other))
  done = train.train(**settings(folder, loader=other, data_change='allow'))
  assert done['step'] == STEPS


def test_a_loss_that_is_no_number_ends_the_run_and_names_the_step(whole, tmp_path):
  (tmp_path / 'stores').symlink_to(whole[0].parent / 'stores')

  def broken(module, batch, *, dropout_key):
    total, weight, found = losses.next_token(module, batch, dropout_key=dropout_key)
    return total, weight, {**found, 'loss': (found['loss'][0] * np.nan, weight)}

  with pytest.raises(FloatingPointError, match='loss of update 1 is nan.*--step 0'):
    train.train(**settings(tmp_path / 'nan', loss=broken, checkpointer=None))


def test_twenty_steps_follow_the_golden_curve():
  definition = toy.model(vocab=64, layers=2, kv_heads=2)
  optimizer = optim.adamw(learning_rate=3e-2)

  class Cycle(toy.Batches):
    def batch(self, step, rows=None):
      return super().batch(step % 2, rows)

  _, found = toy.steps(toy.structure(definition), definition, 20, optimizer=optimizer,
                       loader=Cycle())
  path = os.path.join(os.path.dirname(__file__), 'golden', 'loss_curve.json')
  with open(path, encoding='utf-8') as file:
    golden = json.load(file)
  assert golden[-1] < golden[0] / 3
  np.testing.assert_allclose([m['loss'] for m in found], golden, rtol=5e-4)
