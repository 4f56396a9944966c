"""Mixtures of experts: the same as a loop over tokens, exact about places, blind to padding."""

import dataclasses
import functools
from typing import Any, NamedTuple, cast

import golden_hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax import nnx

from models import grouped, layers, moe
from models.config import DecoderConfig
from models.hf import tree
from partitioning import rules
from t5x_like import config, losses, optim, step


def _config(**settings) -> DecoderConfig:
  return DecoderConfig(**{**dict(vocab=8, embed=6, layers=1, heads=1, mlp=10, dtype='float32',
                                 experts=4), **settings})


def _experts(config, seed=0) -> moe.Experts:
  """Experts with every parameter drawn, biases too."""
  made = moe.Experts(config, nnx.Rngs(params=seed))
  random = np.random.default_rng(seed)
  for parameter in jax.tree.leaves(nnx.state(made), is_leaf=lambda x: isinstance(x, nnx.Variable)):
    assert parameter.get_metadata()['axes']
  draw = lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32)
  nnx.update(made, jax.tree.map(draw, nnx.state(made)))
  return made


def _x(rows=2, length=12, width=6):
  return jnp.asarray(np.random.default_rng(1).normal(size=(rows, length, width)), jnp.float32)


def _one_token(made, x, expert):
  """One token through one expert, written out."""
  def linear(kernels, value):
    bias = 0 if kernels.bias is None else np.asarray(kernels.bias[...])[expert]
    return value @ np.asarray(kernels.kernel[...])[expert] + bias

  act = layers.ACTIVATIONS[made.config.activation]
  hidden = linear(made.up, x)
  hidden = np.asarray(act(hidden) if made.gate is None else act(linear(made.gate, x)) * hidden)
  return linear(made.down, hidden)


def _loop(made, x, kept=None):
  """Token by token; `kept` says which choices count."""
  logits = np.asarray(x) @ np.asarray(made.router.kernel[...])
  out = np.zeros_like(x)
  for b, i in np.ndindex(*x.shape[:2]):
    shares = np.exp(logits[b, i]) / np.exp(logits[b, i]).sum()
    best = np.argsort(-shares)[:made.config.experts_per_token]
    if made.config.router_weights == 'renormalised':
      shares = shares / shares[best].sum()
    for k, expert in enumerate(best):
      if kept is None or kept[b, i, k]:
        out[b, i] += shares[expert] * _one_token(made, np.asarray(x)[b, i], expert)
  return out


@pytest.mark.parametrize('settings', [
    {}, {'router_weights': 'softmax', 'experts_per_token': 1},
    {'mlp_form': 'plain', 'activation': 'relu', 'biases': ('mlp',), 'experts_per_token': 3}])
def test_dropless_equals_a_loop_over_tokens(settings):
  made, x = _experts(_config(**settings)), _x()
  y, routed = jax.jit(lambda x: made(x, None))(x)
  np.testing.assert_allclose(y, _loop(made, x), atol=2e-5)
  assert np.asarray(routed.kept).all() and moe.dropped(routed)[0] == 0


@pytest.mark.parametrize('sizes', [(5, 0, 19, 8), (0, 0, 0, 32), (32, 0, 0, 0), (8, 8, 8, 8)])
def test_blocks_equal_ragged_products_and_so_do_their_gradients(sizes):
  random = np.random.default_rng(0)
  x, w, g = (jnp.asarray(random.normal(size=s), jnp.float32)
             for s in ((32, 6), (4, 6, 10), (32, 10)))
  sizes = jnp.asarray(sizes, jnp.int32)
  scored = lambda product: jax.jit(jax.value_and_grad(
      lambda x, w: jnp.vdot(product(x, w, sizes), g), (0, 1)))(x, w)
  for found, wanted in zip(jax.tree.leaves(scored(grouped.blocked)),
                           jax.tree.leaves(scored(jax.lax.ragged_dot)), strict=True):
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_capacity_drops_exactly_the_overflow():
  config = _config(expert_capacity=1.0, experts_per_token=2, biases=('mlp',))
  made, x = _experts(config), _x()
  real = np.arange(12) < np.array([[12], [7]])
  y, routed = jax.jit(lambda x: made(x, jnp.asarray(real)))(x)
  chosen, kept = np.asarray(routed.chosen), np.asarray(routed.kept)
  places = moe.capacity(config, 12)
  assert places == 6
  wanted = np.zeros_like(kept)
  for row in range(2):
    taken = np.zeros(4, int)
    for k, i in np.ndindex(2, 12):  # All first choices, then all second ones.
      expert = chosen[row, i, k]
      wanted[row, i, k] = real[row, i] and taken[expert] < places
      taken[expert] += wanted[row, i, k]
  np.testing.assert_array_equal(kept, wanted)
  lost, choices = moe.dropped(routed)
  assert choices == 2 * real.sum() and lost == choices - wanted.sum() and lost > 0
  np.testing.assert_allclose(y, _loop(made, x, kept), atol=2e-5)


def test_padding_takes_no_place_and_no_part_in_the_losses():
  config = _config(expert_capacity=0.5)
  made, x = _experts(config), _x()
  run = jax.jit(lambda x, real: made(x, real))
  # Two tokens of padding before the row: all that is real is as it is without them.
  moved = jnp.concatenate([jnp.ones((2, 2, 6)), x[:, :10]], 1)
  real = jnp.broadcast_to(jnp.arange(12) >= 2, (2, 12))
  (y, routed), (shifted, found) = run(x, jnp.arange(12)[None].repeat(2, 0) < 10), run(moved, real)
  np.testing.assert_allclose(shifted[:, 2:], y[:, :10], atol=1e-6)
  assert not np.asarray(shifted[:, :2]).any()
  for loss in (moe.balance_loss, moe.z_loss):
    np.testing.assert_allclose(loss(found), loss(routed), rtol=1e-6)


def test_balance_loss_is_least_for_even_choices():
  chosen = jnp.asarray([[[0], [1], [2], [3]]])
  even = moe.Routed(jnp.zeros((1, 4, 4)), chosen, chosen >= 0, jnp.ones((1, 4), bool))
  assert float(moe.balance_loss(even)) == pytest.approx(1.0)
  one = even._replace(logits=jnp.zeros((1, 4, 4)).at[..., 0].set(50.0), chosen=0 * chosen)
  assert float(moe.balance_loss(one)) == pytest.approx(4.0)
  assert float(moe.z_loss(even)) == pytest.approx(np.log(4) ** 2)


def test_router_of_mixtral_equals_the_reference():
  io = golden_hf.outputs('mixtral')
  structure = golden_hf.structure('mixtral')
  params = golden_hf.params('mixtral', structure)
  with jax.set_mesh(structure.mesh), rules.use(structure.rules):
    _, routed = jax.jit(lambda p, ids: structure.module(p).logits_and_router(ids))(
        params, io['input_ids'])
  golden_hf.close(routed.logits, io['router_logits'], 'router logits')
  np.testing.assert_allclose(moe.balance_loss(routed), io['aux_loss'], rtol=golden_hf.OF_LOSS)


class _Held(NamedTuple):
  """A tensor of a file that is not one."""

  value: np.ndarray
  path: str = 'file'
  dtype: str = 'F32'
  start: int = 0

  @property
  def shape(self):
    return self.value.shape

  def read(self):
    return self.value


def test_joined_experts_of_mixtral_are_read_too():
  found, stored = golden_hf.family('mixtral'), golden_hf.stored('mixtral')
  held = {name: _Held(tensor.read()) for name, tensor in stored.items()}
  for layer in range(2):
    old, new = (f'model.layers.{layer}.{name}' for name in ('block_sparse_moe', 'mlp'))
    each = {w: np.stack([held.pop(f'{old}.experts.{i}.{w}.weight').value for i in range(4)])
            for w in ('w1', 'w2', 'w3')}
    held |= {f'{new}.gate.weight': held.pop(f'{old}.gate.weight'),
             f'{new}.experts.down_proj': _Held(each['w2']),
             f'{new}.experts.gate_up_proj': _Held(np.concatenate([each['w1'], each['w3']], 1))}
  config, leaves = golden_hf.config('mixtral'), golden_hf.leaves(golden_hf.structure('mixtral'))
  wanted = tree.from_tensors(found, config, leaves, stored)
  for path, value in tree.from_tensors(found, config, leaves, cast(Any, held)).items():
    np.testing.assert_array_equal(value, wanted[path], err_msg=path)


@pytest.mark.parametrize('mode', ['auto', 'explicit'])
def test_sharded_equals_unsharded(mode):
  settings = dict(experts=4, expert_capacity=1.0, layers=1, biases=('mlp',))
  definition = toy.model(**settings)
  params = nnx.to_pure_dict(nnx.state(definition.build(nnx.Rngs(params=0)), nnx.Param))

  def scored(structure):
    def loss(p, batch):
      total, weight, metrics = losses.next_token(structure.module(p), batch, balance_loss=0.1,
                                                 router_z_loss=0.01)
      return total / weight, metrics
    placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params,
                          structure.shapes)
    loader = toy.Batches()
    batch = step.place(loader, 0, step.batch_shapes(loader.spec, structure))
    with jax.set_mesh(structure.mesh), rules.use(structure.rules):
      return jax.jit(jax.value_and_grad(loss, has_aux=True))(placed, batch)

  (wanted, metrics), grads = scored(toy.structure(definition))
  (found, others), sharded = scored(
      toy.structure(definition, data=2, fsdp=2, tensor=2, mode=mode))
  np.testing.assert_allclose(found, wanted, rtol=2e-6)
  assert metrics['dropped'][0] > 0 and {'balance_loss', 'router_z_loss'} <= metrics.keys()
  for name, (total, _) in metrics.items():
    np.testing.assert_allclose(others[name][0], total, rtol=1e-5, err_msg=name)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6), sharded, grads)


class _Same(toy.Batches):
  """The same batch at every step."""

  def batch(self, step, rows=None):
    return super().batch(0, rows)


def test_model_file_trains():
  config.load(['models/moe_tiny.gin'], ['published.model.model = %MODEL',
                                         f'VOCAB_SIZE = {toy.VOCAB}'], modules=['published'])
  definition = config.call('published.model')
  config.clear()
  assert definition.config.experts == 4
  loss = functools.partial(losses.next_token, balance_loss=0.01, router_z_loss=0.001)
  _, found = toy.steps(toy.structure(definition), definition, 12, loader=_Same(), loss=loss,
                       microbatches=2)
  assert found[-1]['loss'] < 0.7 * found[0]['loss']
  # Two choices per token: about 2 where they are even.
  assert 1.9 < found[-1]['balance_loss'] < 3 and found[-1]['dropped'] == 0


def test_losses_of_routers_need_a_router():
  module = nnx.eval_shape(lambda: toy.model().build(nnx.Rngs(params=0)))
  batch = jax.tree.map(jnp.asarray, toy.batch(2))
  with pytest.raises(ValueError, match='no router: DecoderConfig.experts is None'):
    losses.next_token(module, batch, balance_loss=0.01)
  with pytest.raises(ValueError, match='need a model with logits_and_router; function has none'):
    losses.next_token(lambda inputs, **given: None, batch, router_z_loss=0.01)


def test_muon_orthogonalises_the_matrix_of_each_expert():
  grads = {'layers': {'mlp': {'up': {'kernel': jnp.asarray(
      np.random.default_rng(0).normal(size=(2, 3, 6, 10)), jnp.float32)}}}}
  muon = optim.muon(learning_rate=1.0, weight_decay=0.0, clip_norm=None)
  updates = jax.jit(lambda g: muon.update(g, muon.init(g), g)[0])(grads)
  for matrix in np.asarray(updates['layers']['mlp']['up']['kernel']).reshape(-1, 6, 10):
    values = np.linalg.svd(matrix / (0.2 * np.sqrt(10)), compute_uv=False)
    assert 0.6 < values.min() and values.max() < 1.3


def test_cost_counts_the_experts_a_token_meets():
  one, many = _config(experts=None), _config(experts_per_token=2)
  mlp = 3 * 6 * 10
  assert many.matmul_params() - one.matmul_params() == mlp + 6 * 4
  more = dataclasses.replace(many, experts=64)
  assert more.matmul_params() - many.matmul_params() == 6 * 60
