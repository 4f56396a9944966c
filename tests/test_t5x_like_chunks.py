"""A stack of layers is stored, restored and exported layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from models.config import DecoderConfig
from models.decoder import DecoderLM
from models.hf import files
from partitioning import mesh as mesh_lib
from partitioning import rules as rules_lib
from t5x_like import checkpoints, chunks, state
from t5x_like.interchange import arrays, exporting

_CONFIG = DecoderConfig(vocab=32, embed=16, layers=4, heads=2, mlp=24, dtype='float32', experts=2,
                        experts_per_token=1)


def _params(devices: int):
  structure = state.describe(DecoderLM(config=_CONFIG), mesh_lib.make_mesh(devices=devices),
                             rules_lib.fsdp())
  draw = np.random.default_rng(0)
  return jax.tree.map(lambda x: jax.device_put(jnp.asarray(
      draw.normal(size=x.shape), x.dtype), x.sharding), structure.shapes)


def _save(tmp_path, devices: int):
  params = _params(devices)
  with checkpoints.Checkpointer(tmp_path / 'run', every=1, mode='sync') as keeper:
    assert keeper.save(1, {'params': params}, extra={})
    restored = keeper.restore({'params': jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)})
  assert restored is not None and toy.tree_equal(restored[1]['params'], params)
  return params


@pytest.mark.parametrize('shard, axes', [
    ((80, 8192, 28672), (0,)), ((32, 8, 4096, 14336), (0, 1)), ((128256, 8192), ()),
    ((8192, 64, 128), ()), ((2, 16, 24), ()), ((80, 8192), ()), ((), ())])
def test_the_axes_of_layers_and_experts_are_cut(shard, axes):
  assert chunks.stacked(shard, 4) == axes


@pytest.mark.parametrize('devices', [1, 4])
@pytest.mark.parametrize('largest', [0, 1 << 30])
def test_an_export_reads_the_layers_that_are_stored_alone(tmp_path, monkeypatch, devices, largest):
  monkeypatch.setattr(chunks, 'LARGEST', largest)
  params, most, keep = _save(tmp_path, devices), [], arrays.Reader.keep
  monkeypatch.setattr(arrays.Reader, 'keep', lambda self, names: (
      most.append(sum('kernel' in name for name in self._whole)), keep(self, names))[1])
  out = exporting.export(str(tmp_path / 'run'), out=str(tmp_path / 'out'),
                         model=DecoderLM(config=_CONFIG), family='mixtral', which='params')
  made = files.tensors(out)
  for layer, expert in np.ndindex(4, 2):
    name = f'model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight'
    np.testing.assert_array_equal(made[name].read(), np.asarray(
        params['layers']['mlp']['up']['kernel'])[layer, expert].T)
  # A matrix in one chunk with its layers is kept until the next one is read, and no longer.
  assert max(most) == (1 if largest else 0)
