"""Checkpoints when the disk is full, the directory unwritable, or the process killed."""

import pathlib
import resource
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from t5x_like import checkpoints


def abstract(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def restore(saver, like):
  found = saver.restore(like)
  assert found is not None
  return found


def test_full_disk_is_survived(tmp_path, capfd):
  noise = np.random.default_rng(0).integers(0, 2**32, 500_000, dtype=np.uint32)
  state = {'w': jnp.asarray(noise)}
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  with checkpoints.Checkpointer(tmp_path, every=1) as saver:
    assert saver.save(1, state, extra={})
    saver.wait()
    try:
      resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))
      saver.save(2, state, extra={})
      saver.wait()
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert saver.last_error is not None
    told = capfd.readouterr().err
    assert f'checkpoint {tmp_path / "2"} was NOT saved' in told
    assert 'Complete checkpoints: [1]' in told
    assert saver.steps() == [1]
    assert saver.save(3, state, extra={})
    saver.wait()
    assert saver.last_error is None and saver.steps() == [1, 3]
    assert restore(saver, abstract(state))[0] == 3
  assert {p.name for p in tmp_path.iterdir()} == {'1', '3'}


def test_unwritable_directory_is_told_and_the_run_goes_on(tmp_path, capfd):
  (tmp_path / 'taken').write_text('a file where the directory should be')
  with checkpoints.Checkpointer(tmp_path / 'taken' / 'run', every=1) as saver:
    assert not saver.save(1, {'w': jnp.ones(2)}, extra={})
    assert isinstance(saver.last_error, OSError)
    assert 'was NOT saved' in capfd.readouterr().err
    (tmp_path / 'taken').unlink()
    assert saver.save(2, {'w': jnp.ones(2)}, extra={})
  assert (tmp_path / 'taken/run/2').is_dir()


CHILD = """
import sys, jax, jax.numpy as jnp
from t5x_like import checkpoints
saver = checkpoints.Checkpointer(sys.argv[1], every=1, keep=2)
tree = {'w': jnp.zeros((600, 1000)), 'n': jnp.int32(0)}
update = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
found = saver.restore(jax.eval_shape(lambda: tree))
step, tree, _ = found or (0, tree, {})
while True:
  tree, step = update(tree), step + 1
  saver.save(step, tree, extra={'step': step})
  print(step, flush=True)
"""


def test_killed_during_a_save_leaves_a_good_checkpoint(tmp_path):
  last, cut, line, tree = 0, 0, '', None
  for seed in range(3):
    root = pathlib.Path(__file__).parent.parent
    with subprocess.Popen([sys.executable, '-c', CHILD, str(tmp_path)], text=True,
                          stdout=subprocess.PIPE, cwd=root) as child:
      assert child.stdout is not None
      for _ in range(4):
        line = child.stdout.readline()
      time.sleep(float(np.random.default_rng(seed).uniform(0, 0.04)))
      child.send_signal(signal.SIGKILL)
    cut += any(not p.name.isdigit() for p in tmp_path.iterdir())
    with checkpoints.Checkpointer(tmp_path, every=1) as reader:
      like = {
        'w': jax.ShapeDtypeStruct((600, 1000), jnp.float32),
        'n': jax.ShapeDtypeStruct((), jnp.int32),
      }
      step, tree, extra = restore(reader, like)
    assert step >= int(line) - 1 > last and extra == {'step': step}
    assert int(tree['n']) == step
    np.testing.assert_array_equal(np.asarray(tree['w']), np.float32(step))
    last = step
  assert cut, 'no kill hit a save: the test shows nothing'
  with checkpoints.Checkpointer(tmp_path, every=1, keep=2) as saver:
    saver.save(last + 1, tree, extra={})
  assert all(p.name.isdigit() for p in tmp_path.iterdir()), 'partial ones are cleaned'
