"""Meshes and rules: ordered with fallback, cover or refuse, exact layouts."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from jax.sharding import PartitionSpec as P

from partitioning import mesh as mesh_lib
from partitioning import rules


def abstract(**sizes):
  return jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))


MESH = abstract(data=2, fsdp=2, tensor=2)


def test_first_free_rule_wins_and_falls_back():
  table = (('embed', 'fsdp'), ('mlp', 'tensor'), ('embed', 'tensor'), ('embed', None))
  assert rules.spec(('embed', 'mlp'), (4, 4), table, MESH) == P('fsdp', 'tensor')
  assert rules.spec(('embed', 'embed'), (4, 4), table, MESH) == P('fsdp', 'tensor')
  # Both mesh axes are taken, so the third falls back to None.
  assert rules.spec(('embed', 'mlp', 'embed'), (4, 4, 4), table, MESH) == P('fsdp', 'tensor', None)
  # An indivisible dimension takes the next rule of the same name.
  assert rules.spec(('embed',), (3,), table, MESH) == P(None)


def test_unknown_axis_is_refused_with_the_nearest_name():
  with pytest.raises(ValueError, match=r"w: no sharding rule for logical axis 'headz'.*"
                                       r"did you mean 'heads'"):
    rules.spec(('headz',), (4,), rules.fsdp_tensor().params, MESH, name='w')


def test_indivisible_axis_is_named_with_its_size_and_mesh_axis():
  with pytest.raises(ValueError, match=r"layers/q: dimension 1 \('heads', size 3\) is not "
                                       r"divisible by mesh axis 'tensor' \(size 2\)"):
    rules.spec(('embed', 'heads'), (4, 3), rules.fsdp_tensor().params, MESH, name='layers/q')
  # Key/value heads may be fewer than the tensor axis: their rule has a fallback.
  assert rules.spec(('kv_heads',), (1,), rules.fsdp_tensor().params, MESH) == P(None)


def test_unknown_mesh_axis_is_refused():
  with pytest.raises(ValueError, match=r"rule \('embed', 'model'\) names mesh axis 'model'"):
    rules.spec(('embed',), (4,), (('embed', 'model'),), MESH)


def test_custom_rules_go_before_the_preset():
  made = rules.custom(params=[['mlp', 'fsdp']], activations=[])
  assert rules.spec(('embed', 'mlp'), (4, 4), made.params, MESH) == P(None, 'fsdp')


def test_replication_above_the_limit_is_reported():
  named = {'big': (2**30, P(None, None)), 'split': (2**30, P('fsdp')), 'small': (10, P(None))}
  mesh = mesh_lib.make_mesh(data=4, fsdp=2)
  assert rules.replicated_report(named, rules.fsdp(), mesh) == [
      'big: 1024 MiB replicated on 8 devices']
  assert rules.replicated_report(named, rules.fsdp(), mesh_lib.make_mesh(data=8)) == []


@pytest.mark.parametrize('sizes, text', [
    ({'data': 3}, r'does not cover 8 devices.*product is 8'),
    ({'data': -1, 'fsdp': -1}, 'only one mesh axis'),
    ({'data': 0}, 'must be positive or -1'),
    ({'data': -1, 'fsdp': 3}, r'does not cover 8 devices'),
])
def test_mesh_sizes_are_checked(sizes, text):
  with pytest.raises(ValueError, match=text):
    mesh_lib.resolve_shape(sizes, 8)


def test_more_devices_than_present_are_refused():
  with pytest.raises(ValueError, match='devices=9 but 8 are available'):
    mesh_lib.make_mesh(devices=9)
  with pytest.raises(ValueError, match='already runs with 8'):
    mesh_lib.make_mesh(simulated_devices=5)


def test_layout_on_simulated_devices_is_exactly_the_one_asked_for():
  described = toy.structure(data=2, fsdp=2, tensor=2)
  kernel = described.shapes['layers']['mlp']['up']['kernel']
  assert kernel.sharding.spec == P(None, 'fsdp', 'tensor')
  assert kernel.sharding.shard_shape(kernel.shape) == (2, 8, 16)
  value = jax.device_put(np.zeros(kernel.shape, np.float32), kernel.sharding)
  assert {s.data.shape for s in value.addressable_shards} == {(2, 8, 16)}
  assert len({s.device for s in value.addressable_shards}) == 8


def test_every_preset_covers_the_decoder():
  for preset in (rules.data_parallel, rules.fsdp, rules.tensor, rules.fsdp_tensor):
    described = toy.structure(toy.model(kv_heads=2, biases=('qkv', 'out', 'mlp', 'norm', 'head'),
                                        position='learned'), preset(), data=2, fsdp=2, tensor=2)
    assert all(row['spec'] is not None for row in described.rows())


@pytest.mark.parametrize('sizes', [{'data': 1}, {'fsdp': 2, 'tensor': 4}])
def test_wide_products_have_the_gradients_of_narrow_ones(sizes):
  columns = rules._WIDE
  x, w, g = (jax.random.normal(jax.random.key(i), shape)
             for i, shape in enumerate([(2, 4, 8), (8, columns), (2, 4, columns)]))
  mesh = mesh_lib.make_mesh(devices=math.prod(sizes.values()), **sizes)

  @jax.jit
  def found(x, w):
    project = lambda x, w: rules.project(x, w, ('batch', 'length', 'vocab'))
    y, back = jax.vjp(project, x, rules.gathered(w, 'embed', 'vocab'))
    return y, *back(g)

  wanted = (jnp.einsum('bld,dv->blv', x, w), jnp.einsum('blv,dv->bld', g, w),
            jnp.einsum('bld,blv->dv', x, g))
  with jax.set_mesh(mesh), rules.use(rules.fsdp_tensor()):
    for got, exact in zip(found(x, w), wanted, strict=True):
      np.testing.assert_allclose(got, exact, atol=2e-4)
