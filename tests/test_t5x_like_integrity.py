"""Checksums that no sharding changes and every bit does; manifests that show every edit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from t5x_like import integrity


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8])
def test_checksum_does_not_depend_on_sharding_and_sees_every_change(dtype):
  x = jnp.asarray(np.random.default_rng(1).integers(0, 200, (8, 4, 6)), dtype)
  whole = integrity.checksums({'x': x})
  for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((2, 2, 2), ('data', 'fsdp', 'tensor'), axis_types=(kind,) * 3)
    for spec in (P('fsdp', None, 'tensor'), P(('data', 'fsdp'), 'tensor'), P(None, 'data')):
      placed = jax.device_put(x, NamedSharding(mesh, spec))
      assert integrity.checksums({'x': placed}) == whole
  changes = [
    x[::-1],
    x.swapaxes(0, 0).at[0, 0, 0].add(1),
    x.at[7, 3, 5].set(x[7, 3, 5] + 1),
    x.at[0, 0].set(x[0, 1]).at[0, 1].set(x[0, 0]),
    jnp.zeros_like(x),
  ]
  sums = {integrity.checksums({'x': y})['x'] for y in changes}
  assert len(sums) == len(changes) and whole['x'] not in sums


def test_checksum_sees_bits_and_not_values():
  a, b = integrity.checksums({'a': jnp.zeros(4), 'b': -jnp.zeros(4)}).values()
  assert a != b
  nans = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
  a, b = integrity.checksums({'a': jnp.asarray(nans[:1]), 'b': jnp.asarray(nans[1:])}).values()
  assert a != b


def test_a_sealed_manifest_shows_every_change():
  sealed = integrity.seal({'format': integrity.FORMAT, 'extra': {1: (2, None)}})
  assert integrity.unseal(sealed)['extra'] == {'1': [2, None]}
  for changed in ({**sealed, 'body': {**sealed['body'], 'extra': {}}}, {'body': sealed['body']},
                  {**sealed, 'sha256': '0' * 64}, []):
    with pytest.raises(integrity.Damaged, match='manifest'):
      integrity.unseal(changed)
  with pytest.raises(ValueError, match='checkpoint format 0 is unknown; this version reads 1'):
    integrity.unseal(integrity.seal({'format': 0}))
