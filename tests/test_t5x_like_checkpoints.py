"""Checkpoints: bit-identical on any mesh, whole or absent, damage named and skipped."""

import json
import shutil
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from t5x_like import checkpoints, integrity

# Orbax closes its event loop while other reads of a damaged checkpoint are still failing.
pytestmark = pytest.mark.filterwarnings(
  'ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning'
)


def make_mesh(*shape):
  count = int(np.prod(shape))
  return jax.make_mesh(
    shape, ('data', 'fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 3,
    devices=jax.devices()[:count],
  )


def make_state(seed=0):
  keys = jax.random.split(jax.random.key(seed), 2)
  params = {
    'embed': {'table': jax.random.normal(keys[0], (8, 6))},
    'layers': {'mlp': {'up': jax.random.normal(keys[1], (4, 6)).astype(jnp.bfloat16)}},
    'norm': {'scale': jnp.ones((5,))},
  }
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  return {
    'params': params,
    'opt_state': tx.init(params),
    'step': jnp.int32(seed),
    'dropout': jax.random.key(seed),
    'raw_key': jnp.array([seed, 7], jnp.uint32),
    'flag': jnp.array([True, False]),
    'ema': None,
  }


def place(state, mesh):
  def put(x):
    spec = P('fsdp', 'tensor') if x.ndim == 2 else P()
    return jax.device_put(x, NamedSharding(mesh, spec))

  return jax.tree.map(put, state)


def abstract(state, mesh=None):
  def shape(x):
    sharding = mesh and NamedSharding(mesh, P('fsdp', 'tensor') if x.ndim == 2 else P())
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return jax.tree.map(shape, state)


def restore(saver, like, *, step=None):
  found = saver.restore(like, step=step)
  assert found is not None
  return found


def as_bytes(tree):
  def host(x):
    x = jax.random.key_data(x) if integrity.is_key(x) else x
    return str(x.dtype), x.shape, np.asarray(x).tobytes()

  return {name: host(x) for name, x in integrity.named_leaves(tree).items()}


def save_steps(directory, steps, **kwargs):
  with checkpoints.Checkpointer(directory, every=1, **kwargs) as saver:
    for step in steps:
      assert saver.save(step, make_state(step), extra={'step': step})


def test_restores_bit_identically_onto_other_meshes(tmp_path):
  state = place(make_state(3), make_mesh(2, 2, 2))
  with checkpoints.Checkpointer(tmp_path / 'a', every=5) as saver:
    assert saver.restore(abstract(state)) is None
    assert not saver.save(3, state, extra={})
    assert saver.save(5, state, extra={'loader': 'AAE=', 'rates': [0.5, 1]})
    assert not saver.save(5, state, extra={}, force=True), 'a step is written once'
  for mesh in (make_mesh(1, 4, 2), make_mesh(1, 1, 1), None):
    with checkpoints.Checkpointer(tmp_path / 'a', every=5) as reader:
      step, restored, extra = restore(reader, abstract(state, mesh))
    assert step == 5 and extra == {'loader': 'AAE=', 'rates': [0.5, 1]}
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert as_bytes(restored) == as_bytes(state)
    table = restored['params']['embed']['table']
    assert len(table.sharding.device_set) == (1 if mesh is None else mesh.size)


def test_donating_right_after_save_does_not_change_what_is_saved(tmp_path):
  update = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
  tree = {'w': jnp.zeros((512, 512)), 'n': jnp.int32(0)}
  with checkpoints.Checkpointer(tmp_path, every=1, keep=10) as saver:
    for step in range(5):
      saver.save(step, tree, extra={})
      for _ in range(3):
        tree = update(tree)
    saver.wait()
    for step in range(5):
      restored = restore(saver, abstract(tree), step=step)[1]
      assert int(restored['n']) == 3 * step
      np.testing.assert_array_equal(np.asarray(restored['w']), np.float32(3 * step))


def test_save_returns_before_the_checkpoint_exists(tmp_path, monkeypatch):
  saver, gate = checkpoints.Checkpointer(tmp_path, every=1), threading.Event()
  finalize = saver._writer.handler.finalize
  monkeypatch.setattr(
    saver._writer.handler, 'finalize', lambda directory: (gate.wait(30), finalize(directory))
  )
  assert saver.save(1, make_state(), extra={})
  assert saver.steps() == [], 'half a checkpoint must not be listed'
  gate.set()
  saver.wait()
  assert saver.steps() == [1]
  saver.close()


def test_keeps_the_newest_and_the_milestones(tmp_path):
  with checkpoints.Checkpointer(tmp_path, every=2, keep=2, keep_every=6, mode='sync') as saver:
    for step in range(1, 17):
      assert saver.save(step, {'w': jnp.ones(3)}, extra={}) == (step % 2 == 0)
    assert saver.steps() == [6, 12, 14, 16]
    assert saver.save(17, {'w': jnp.ones(3)}, extra={}, force=True)
    assert saver.steps() == [6, 12, 16, 17]


def data_files(directory):
  files = [p for p in (directory / 'state').rglob('*') if p.is_file() and p.parent.name == 'd']
  return sorted(files, key=lambda p: p.stat().st_size)


def flip(path):
  content = bytearray(path.read_bytes())
  for at in range(len(content) // 4, len(content), max(1, len(content) // 8)):
    content[at] ^= 0x40
  path.write_bytes(content)


def flip_data(directory):
  for path in data_files(directory):
    flip(path)


def truncate_data(directory):
  for path in data_files(directory):
    path.write_bytes(path.read_bytes()[:-5])


def delete_data(directory):
  for path in data_files(directory):
    path.unlink()


def edit_manifest(directory):
  path = next(p for p in (directory / 'manifest').iterdir() if 'extra' in p.read_text())
  path.write_text(path.read_text().replace('"extra": {"step": 3}', '"extra": {"step": 4}'))


def empty_manifest(directory):
  next(p for p in (directory / 'manifest').iterdir() if 'extra' in p.read_text()).write_text('')


@pytest.mark.parametrize(
  'harm', [flip_data, truncate_data, delete_data, edit_manifest, empty_manifest]
)
def test_damage_is_named_and_the_newest_good_one_used(tmp_path, capsys, harm):
  save_steps(tmp_path, (1, 2, 3))
  harm(tmp_path / '3')
  with checkpoints.Checkpointer(tmp_path, every=1) as saver:
    step, restored, extra = restore(saver, abstract(make_state()))
    assert step == 2 and extra == {'step': 2}
    assert as_bytes(restored) == as_bytes(make_state(2))
    told = capsys.readouterr().err
    assert f'checkpoint {tmp_path / "3"} is damaged' in told
    where = 'manifest' if 'manifest' in harm.__name__ else str(tmp_path / '3/state')
    assert where in told
    assert saver.steps() == [1, 2, 3], 'reading changes nothing'
    with pytest.raises(ValueError, match='no usable checkpoint'):
      restore(saver, abstract(make_state()), step=3)
    step, _, _ = restore(saver, abstract(make_state()))
    assert saver.save(3, make_state(33), extra={'step': 3})
    saver.wait()
    assert saver.steps() == [1, 2, 3]
    assert (tmp_path / 'damaged-3-0').exists()
    assert as_bytes(restore(saver, abstract(make_state()))[1]) == as_bytes(make_state(33))


def test_silent_change_of_one_tensor_is_named(tmp_path, capsys):
  save_steps(tmp_path, (1, 2))
  changed = make_state(2)
  table = changed['params']['embed']['table']
  changed['params']['embed']['table'] = table.at[3, 4].set(-table[3, 4])
  with checkpoints.Checkpointer(tmp_path / 'other', every=1) as other:
    other.save(2, changed, extra={'step': 2})
  shutil.rmtree(tmp_path / '2/state')
  shutil.copytree(tmp_path / 'other/2/state', tmp_path / '2/state')
  with checkpoints.Checkpointer(tmp_path, every=1) as saver:
    assert restore(saver, abstract(changed))[0] == 1
    told = capsys.readouterr().err
    assert 'tensors differ from what was saved: params/embed/table (checksum' in told
    assert 'norm' not in told
  shutil.rmtree(tmp_path / '1/state/d')
  with (
    checkpoints.Checkpointer(tmp_path, every=1) as saver,
    pytest.raises(ValueError, match='no usable checkpoint') as caught,
  ):
    restore(saver, abstract(changed))
  assert str(tmp_path / '1') in str(caught.value) and str(tmp_path / '2') in str(caught.value)


def test_rewinding_sets_newer_checkpoints_aside_at_the_next_save(tmp_path):
  save_steps(tmp_path, (1, 2, 3))
  with checkpoints.Checkpointer(tmp_path, every=1, mode='sync') as saver:
    assert restore(saver, abstract(make_state()), step=1)[0] == 1
    assert saver.save(2, make_state(22), extra={})
    assert saver.steps() == [1, 2]
    assert {p.name for p in tmp_path.iterdir()} == {'1', '2', 'abandoned-2-0', 'abandoned-3-0'}
    assert as_bytes(restore(saver, abstract(make_state()))[1]) == as_bytes(make_state(22))


def test_wrong_checkpoint_lists_every_difference_before_loading(tmp_path):
  save_steps(tmp_path, (1,))
  wanted = abstract(make_state())
  wanted['params']['embed'] = {'tables': wanted['params']['embed']['table']}
  wanted['params']['norm']['scale'] = jax.ShapeDtypeStruct((7,), jnp.float32)
  wanted['raw_key'] = jax.ShapeDtypeStruct((2,), jnp.int32)
  shutil.rmtree(tmp_path / '1/state')  # Nothing of it may be needed to say so.
  with checkpoints.Checkpointer(tmp_path, every=1) as saver, pytest.raises(ValueError) as caught:
    restore(saver, wanted)
  text = str(caught.value)
  assert f'checkpoint {tmp_path / "1"} does not fit this model, 4 differences' in text
  assert (
    'missing in the checkpoint: params/embed/tables float32[8, 6] (nearest: params/embed/table)'
  ) in text
  assert 'only in the checkpoint: params/embed/table' in text
  assert 'params/norm/scale is float32[5] in the checkpoint, float32[7] in the model' in text
  assert 'raw_key is uint32[2] in the checkpoint, int32[2] in the model' in text


def test_load_params_reads_only_weights_and_casts(tmp_path):
  state = place(make_state(4), make_mesh(2, 2, 2))
  with checkpoints.Checkpointer(tmp_path, every=1) as saver:
    saver.save(4, state, extra={})
  for path in (tmp_path, tmp_path / '4'):
    params = checkpoints.load_params(path, abstract(state['params'], make_mesh(1, 4, 2)))
    assert as_bytes(params) == as_bytes(state['params'])
  half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), state['params'])
  table = checkpoints.load_params(str(tmp_path), half)['embed']['table']
  assert table.dtype == jnp.bfloat16
  np.testing.assert_array_equal(
    np.asarray(table), np.asarray(state['params']['embed']['table'].astype(jnp.bfloat16))
  )
  with pytest.raises(ValueError, match=r'missing in the checkpoint: params/embed/head'):
    checkpoints.load_params(tmp_path, {'embed': {'head': jax.ShapeDtypeStruct((2,), jnp.int32)}})
  with pytest.raises(ValueError, match='no complete checkpoint in'):
    checkpoints.load_params(tmp_path / 'nowhere', half)
  with pytest.raises(ValueError, match=r'no complete checkpoint of step 9 .* there are \[4\]'):
    checkpoints.load_params(tmp_path, half, step=9)


def test_load_params_prefers_the_average_where_asked(tmp_path):
  tree, like = {'w': jnp.ones(3)}, {'w': jax.ShapeDtypeStruct((3,), jnp.float32)}
  with checkpoints.Checkpointer(tmp_path, every=1) as saver:
    saver.save(1, {'params': tree}, extra={})
    saver.save(2, {'params': tree, 'ema': {'w': jnp.zeros(3)}}, extra={})
  assert float(checkpoints.load_params(tmp_path, like)['w'][0]) == 1
  assert float(checkpoints.load_params(tmp_path, like, which='ema')['w'][0]) == 0
  assert float(checkpoints.load_params(tmp_path, like, which='evaluated')['w'][0]) == 0
  assert float(checkpoints.load_params(tmp_path, like, which='evaluated', step=1)['w'][0]) == 1
  with pytest.raises(ValueError, match='missing in the checkpoint: ema/w'):
    checkpoints.load_params(tmp_path, like, which='ema', step=1)
  wrong: Any = 'average'
  with pytest.raises(ValueError, match="which='average': allowed are params, ema, evaluated"):
    checkpoints.load_params(tmp_path, like, which=wrong)


@pytest.mark.parametrize(
  'kwargs, text',
  [
    ({'every': 0}, 'every=0: allowed are integers from 1'),
    ({'every': 1, 'keep': 0}, 'keep=0: allowed are integers from 1'),
    ({'every': 1, 'mode': 'lazy'}, "mode='lazy': allowed are 'async' and 'sync'"),
  ],
)
def test_refuses_wrong_settings(tmp_path, kwargs, text):
  with pytest.raises(ValueError, match=text):
    checkpoints.Checkpointer(tmp_path, **kwargs)


def test_refuses_what_cannot_be_stored(tmp_path):
  with checkpoints.Checkpointer(tmp_path, every=1) as saver:
    with pytest.raises(ValueError, match='extra must hold only JSON values'):
      saver.save(1, {'w': jnp.ones(2)}, extra={'bytes': b'x'})
    with pytest.raises(ValueError, match="state leaf 'n' is of type int"):
      saver.save(1, {'n': 3}, extra={})
    with pytest.raises(ValueError, match='separates names'):
      saver.save(1, {'a/b': jnp.ones(2)}, extra={})


def test_manifest_is_readable(tmp_path):
  save_steps(tmp_path, (7,))
  files = [p for p in (tmp_path / '7/manifest').iterdir() if 'extra' in p.read_text()]
  body = integrity.unseal(json.loads(files[0].read_text()))
  assert body['step'] == 7 and body['extra'] == {'step': 7}
  assert body['tensors']['opt_state/1/0/mu/embed/table']['shape'] == [8, 6]
  assert body['tensors']['dropout']['dtype'] == 'key<fry>'
