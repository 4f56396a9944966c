"""The train step: exact means, the same numbers on every mesh, in auto and in explicit mode."""

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from partitioning import mesh as mesh_lib
from partitioning import rules
from t5x_like import losses, optim, state, step


class NoUpdate:
  """Exposes the gradient: the 'new parameters' are old - gradient."""

  sgd = optax.sgd(1.0)


@pytest.fixture(scope='module')
def reference():
  definition = toy.model(kv_heads=2)
  return toy.steps(toy.structure(definition), definition, 2, optimizer=NoUpdate.sgd)


def assert_same(found, reference, *, atol):
  (state_a, metrics_a), (state_b, metrics_b) = found, reference
  for a, b in zip(metrics_a, metrics_b, strict=True):
    assert a['loss'] == pytest.approx(b['loss'], abs=2e-6)
    assert a['tokens'] == b['tokens']
  jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=atol),
               state_a['params'], state_b['params'])


@pytest.mark.parametrize('preset, sizes', [
    (rules.data_parallel, {'data': 8}),
    (rules.fsdp, {'data': 1, 'fsdp': 8}),
    (rules.fsdp_tensor, {'data': 2, 'fsdp': 2, 'tensor': 2}),
    (rules.tensor, {'data': 2, 'tensor': 4}),
])
def test_sharded_equals_unsharded(preset, sizes, reference, capfd):
  definition = toy.model(kv_heads=2)
  found = toy.steps(toy.structure(definition, preset(), **sizes), definition, 2,
                    optimizer=NoUpdate.sgd)
  assert_same(found, reference, atol=3e-6)
  assert 'rematerialization' not in capfd.readouterr().err


def test_explicit_mesh_equals_unsharded(reference):
  definition = toy.model(kv_heads=2)
  mesh = mesh_lib.make_mesh(data=2, fsdp=2, tensor=2, mode='explicit')
  described = state.describe(definition, mesh, rules.fsdp_tensor())
  found = toy.steps(described, definition, 2, optimizer=NoUpdate.sgd)
  assert_same(found, reference, atol=3e-6)
  kernel = found[0]['params']['layers']['mlp']['up']['kernel']
  assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, 'fsdp', 'tensor')


@pytest.mark.parametrize('sizes, microbatches', [({'data': 1}, 4), ({'data': 2, 'fsdp': 2}, 2)])
def test_microbatches_do_not_change_the_gradient(sizes, microbatches, reference):
  # Rows hold different numbers of real tokens, so a mean of means would be off.
  definition = toy.model(kv_heads=2)
  found = toy.steps(toy.structure(definition, **sizes), definition, 2, optimizer=NoUpdate.sgd,
                    microbatches=microbatches)
  assert_same(found, reference, atol=3e-6)


def test_loss_is_the_mean_over_real_tokens(reference):
  definition = toy.model(kv_heads=2)
  described = toy.structure(definition)
  params = state.initial(definition, described, NoUpdate.sgd, seed=0)['params']
  batch = toy.batch()
  logits = np.asarray(jax.jit(lambda p: described.module(p)(
      batch['inputs'], positions=batch['positions'], segment_ids=batch['segment_ids']))(params),
      np.float64)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  picked = np.take_along_axis(log_p, batch['targets'][..., None], -1)[..., 0]
  weights = batch['loss_weights']
  assert reference[1][0]['loss'] == pytest.approx(-(picked * weights).sum() / weights.sum(), 1e-6)
  assert 0 < weights.mean() < 1


def test_z_loss_is_reported_apart_and_pulls_on_the_normaliser():
  logits = jnp.asarray([[[1.0, 2.0, 3.0]]])
  nll, log_z = losses.cross_entropy(logits, jnp.asarray([[2]]))
  expected = np.log(np.exp([1.0, 2.0, 3.0]).sum())
  np.testing.assert_allclose(log_z, [[expected]], rtol=1e-6)
  np.testing.assert_allclose(nll, [[expected - 3.0]], rtol=1e-5)
  module = lambda inputs, **unused: logits
  batch = {name: jnp.ones((1, 1), jnp.int32)
           for name in ('inputs', 'positions', 'segment_ids', 'targets')}
  batch['loss_weights'] = jnp.full((1, 1), 0.5)
  total, weight, metrics = losses.next_token(module, batch, z_loss=0.1)
  assert float(weight) == 0.5
  assert float(metrics['z_loss'][0]) == pytest.approx(0.1 * expected**2 * 0.5)
  assert float(total) == pytest.approx(float(metrics['loss'][0] + metrics['z_loss'][0]))


def test_dropout_follows_seed_and_step_and_the_average_follows_the_parameters():
  definition = toy.model(dropout=0.3, layers=1)
  described = toy.structure(definition)
  frozen = optax.sgd(0.0)
  first, other = ([m['loss'] for m in toy.steps(described, definition, 2, optimizer=frozen,
                                                loader=Same(), seed=seed)[1]] for seed in (0, 1))
  assert first[0] != first[1] and first[0] != other[0]
  final, _ = toy.steps(described, definition, 1, optimizer=optim.sgd(learning_rate=0.1), ema=0.75)
  start = state.initial(definition, described, frozen, seed=0)['params']
  jax.tree.map(lambda e, p, s: np.testing.assert_allclose(e, 0.75 * s + 0.25 * p, atol=1e-6),
               final['ema'], final['params'], start)


class Same(toy.Batches):
  """The same batch at every step."""

  def batch(self, step, rows=None):
    return super().batch(0, rows)


def test_reported_learning_rate_is_the_one_applied():
  definition = toy.model(layers=1)
  optimizer = optim.sgd(learning_rate=lambda step: jnp.asarray(0.1 / (1 + step)), momentum=None,
                        weight_decay=0.0, clip_norm=None)
  _, found = toy.steps(toy.structure(definition), definition, 2, optimizer=optimizer)
  assert [m['learning_rate'] for m in found] == pytest.approx([0.1, 0.05])


def test_optimizer_state_mirrors_the_parameters_layout():
  described = toy.structure(data=2, fsdp=2, tensor=2)
  for optimizer in (optim.adamw(learning_rate=1e-3), optim.adafactor(learning_rate=1e-3),
                    optim.muon(learning_rate=1e-3), optim.lion(learning_rate=1e-3)):
    abstract = state.abstract(described, optimizer)
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract['opt_state']))
    part = step.memory_per_device(abstract['opt_state'])
    assert part < whole / 2


def test_initial_parameters_do_not_depend_on_the_mesh():
  definition, optimizer = toy.model(layers=1), optax.sgd(1.0, momentum=0.9)
  split = toy.structure(definition, data=2, fsdp=2, tensor=2)
  one, eight = (state.initial(definition, described, optimizer, seed=3) for described in
                (toy.structure(definition), split))
  assert toy.tree_equal(one, eight)
  jax.tree.map(lambda x, a: x.sharding.is_equivalent_to(a.sharding, x.ndim) or pytest.fail(
      f'{x.sharding} is not {a.sharding}'), eight, state.abstract(split, optimizer))


@pytest.mark.parametrize('rows, microbatches, sizes, text', [
    (6, 4, {'data': 1}, 'batch of 6 rows does not divide into 4 microbatches'),
    (6, 1, {'data': 4}, r"'batch', size 6\) is not divisible by mesh axis \('data', 'fsdp'\)"),
    (8, 4, {'data': 4}, r'of one microbatch.*size 2\) is not divisible'),
])
def test_batches_that_do_not_divide_are_refused(rows, microbatches, sizes, text):
  with pytest.raises(ValueError, match=text):
    step.batch_shapes(toy.Batches(rows).spec, toy.structure(**sizes), microbatches=microbatches)


def test_parameters_without_axes_and_other_variables_are_refused():
  from flax import nnx

  class Bare(nnx.Module):
    def __init__(self):
      self.w = nnx.Param(jnp.ones(3))

  class Counting(nnx.Module):
    def __init__(self):
      self.count = nnx.BatchStat(jnp.ones(3))

  mesh = mesh_lib.make_mesh(devices=1)
  for made, text in ((Bare, 'parameter w has no logical axes'), (Counting, 'not nnx.Param')):
    definition: Any = types.SimpleNamespace(build=lambda rngs, made=made: made())
    with pytest.raises(ValueError, match=text):
      state.describe(definition, mesh, rules.fsdp())
