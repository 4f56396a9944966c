"""Optimizers against their formulas; masks by name; schedules at known points."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5x_like import optim, schedules

D, H, K, F, V, LAYERS = 6, 2, 3, 8, 10, 3
WRONG: Any = 'matrx'
OPTIMIZERS: dict[str, Any] = {
    'adamw': optim.adamw, 'lion': optim.lion, 'adafactor': optim.adafactor, 'muon': optim.muon,
    'sgd': optim.sgd}


def block(rng, stack=()):
  def draw(*shape):
    return jnp.asarray(rng.normal(size=(*stack, *shape)), jnp.float32)

  return {'attention': {'query': {'kernel': draw(D, H, K), 'bias': draw(H, K)},
                        'out': {'kernel': draw(H, K, D), 'bias': draw(D)}},
          'mlp': {'up': {'kernel': draw(D, F)}, 'down': {'kernel': draw(F, D)}},
          'norm1': {'scale': draw(D), 'bias': draw(D)}}


def make_params(form='scan', seed=0):
  rng = np.random.default_rng(seed)

  def draw(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  outer = {'embed': {'embedding': draw(V, D)}, 'position': {'embedding': draw(7, D)},
           'norm': {'scale': draw(D)}, 'head': {'kernel': draw(D, V)}}
  stacked = block(rng, (LAYERS,))
  if form == 'scan':
    return {**outer, 'layers': stacked}
  return {**outer, 'layers': {str(i): jax.tree.map(lambda x, i=i: x[i], stacked)
                              for i in range(LAYERS)}}


def flat(tree):
  paths = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): x for path, x in paths}


def host(tree):
  return {name: np.asarray(x) for name, x in flat(tree).items()}


def run(optimizer, params, gradients):
  @jax.jit
  def step(params, state, grads):
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  state = jax.jit(optimizer.init)(params)
  for grads in gradients:
    params, state = step(params, state, grads)
  return host(params)


def clipped(grads, norm):
  total = np.sqrt(sum((g.astype(np.float64)**2).sum() for g in grads.values()))
  return {name: g * min(1.0, norm / total) for name, g in grads.items()}


def decays(name):
  return name.endswith('kernel')


def test_adamw_is_its_formula_with_clipping_and_decoupled_decay():
  params, gradients = make_params(), [make_params(seed=1), make_params(seed=2)]
  rate = schedules.linear(peak=0.1, steps=4, warmup=2)
  got = run(optim.adamw(learning_rate=rate, b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.3,
                        clip_norm=0.5), params, gradients)
  want, m, v = host(params), {}, {}
  for t, grads in enumerate(gradients, 1):
    for name, g in clipped(host(grads), 0.5).items():
      m[name] = 0.8 * m.get(name, 0.0) + 0.2 * g
      v[name] = 0.9 * v.get(name, 0.0) + 0.1 * g**2
      direction = m[name] / (1 - 0.8**t) / (np.sqrt(v[name] / (1 - 0.9**t)) + 1e-6)
      lr = 0.1 * t / 2
      want[name] = want[name] - lr * (direction + 0.3 * decays(name) * want[name])
  for name in want:
    np.testing.assert_allclose(got[name], want[name], rtol=2e-5, atol=2e-6, err_msg=name)


def test_lion_is_its_formula():
  params, gradients = make_params(), [make_params(seed=1), make_params(seed=2)]
  got = run(optim.lion(learning_rate=0.01, b1=0.7, b2=0.9, weight_decay=0.5, clip_norm=None),
            params, gradients)
  want, m = host(params), {}
  for grads in gradients:
    for name, g in host(grads).items():
      direction = np.sign(0.7 * m.get(name, 0.0) + 0.3 * g)
      m[name] = 0.9 * m.get(name, 0.0) + 0.1 * g
      want[name] = want[name] - 0.01 * (direction + 0.5 * decays(name) * want[name])
  for name in want:
    np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_sgd_is_its_formula():
  params, gradients = make_params(), [make_params(seed=1), make_params(seed=2)]
  got = run(optim.sgd(learning_rate=0.1, momentum=0.5, clip_norm=1.0), params, gradients)
  want, m = host(params), {}
  for grads in gradients:
    for name, g in clipped(host(grads), 1.0).items():
      m[name] = 0.5 * m.get(name, 0.0) + g
      want[name] = want[name] - 0.1 * m[name]
  for name in want:
    np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize('step_size', ['relative', 'absolute'])
def test_adafactor_first_step_is_its_formula(step_size):
  rng = np.random.default_rng(0)
  w, g = (rng.normal(size=(4, 6)).astype(np.float32) for _ in range(2))
  optimizer = optim.adafactor(learning_rate=0.1, step_size=step_size, min_factored_dim=2,
                              weight_decay=0.2)
  got = run(optimizer, {'kernel': jnp.asarray(w)}, [{'kernel': jnp.asarray(g)}])['kernel']
  squared = g.astype(np.float64)**2 + 1e-30
  second = np.outer(squared.mean(1), squared.mean(0)) / squared.mean()
  update = g / np.sqrt(second)
  update /= max(1.0, np.sqrt((update**2).mean()))
  scale = np.sqrt((w.astype(np.float64)**2).mean()) if step_size == 'relative' else 1.0
  np.testing.assert_allclose(got, w - 0.1 * (update * scale + 0.2 * w), rtol=1e-4, atol=1e-5)


def matrices(name, update):
  """A parameter's update as [stack, inputs, outputs]."""
  stack = LAYERS if re.match(r'layers/[a-z]', name) else 1
  rows = H * K if 'out/kernel' in name else (F if 'down' in name else D)
  return update.reshape(stack, rows, -1)


def test_muon_orthogonalises_each_layers_matrix_and_leaves_the_rest_to_adam():
  params, grads = make_params(), make_params(seed=1)
  zeros = jax.tree.map(jnp.zeros_like, params)
  got = run(optim.muon(learning_rate=1.0, weight_decay=0.0, clip_norm=None), zeros, [grads])
  adam = run(optim.adamw(learning_rate=1.0, weight_decay=0.0, clip_norm=None), zeros, [grads])
  seen = 0
  for name, update in got.items():
    if 'layers' in name and name.endswith('kernel'):
      for matrix in matrices(name, update):
        values = np.linalg.svd(matrix / (0.2 * np.sqrt(max(matrix.shape))), compute_uv=False)
        assert 0.6 < values.min() and values.max() < 1.3, (name, values)
        seen += 1
    else:
      np.testing.assert_allclose(update, adam[name], rtol=1e-6, err_msg=name)
  assert seen == 4 * LAYERS


def unstacked(host_params):
  out = {}
  for name, x in host_params.items():
    if re.match(r'layers/[a-z]', name):
      out |= {name.replace('layers/', f'layers/{i}/'): x[i] for i in range(LAYERS)}
    else:
      out[name] = x
  return out


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_stacked_layers_are_optimised_as_unrolled_ones(name):
  results = []
  for form in ('scan', 'unrolled'):
    gradients = [make_params(form, seed=1), make_params(form, seed=2)]
    optimizer = OPTIMIZERS[name](learning_rate=0.01, weight_decay=0.2)
    results.append(run(optimizer, make_params(form), gradients))
  scanned, unrolled = unstacked(results[0]), results[1]
  assert scanned.keys() == unrolled.keys()
  for path in scanned:
    np.testing.assert_allclose(scanned[path], unrolled[path], rtol=2e-5, atol=2e-6, err_msg=path)


def test_roles_and_masks_are_decided_by_name():
  wanted = {'embed/embedding': 'embedding', 'position/embedding': 'embedding',
            'norm/scale': 'vector', 'head/kernel': 'head',
            'layers/attention/query/kernel': 'matrix', 'layers/attention/query/bias': 'vector',
            'layers/attention/out/kernel': 'matrix', 'layers/attention/out/bias': 'vector',
            'layers/mlp/up/kernel': 'matrix', 'layers/mlp/down/kernel': 'matrix',
            'layers/norm1/scale': 'vector', 'layers/norm1/bias': 'vector'}
  assert flat(optim.role_tree(make_params())) == wanted
  assert {re.sub(r'layers/\d', 'layers', n): r
          for n, r in flat(optim.role_tree(make_params('unrolled'))).items()} == wanted
  mask = flat(optim.decay_mask(make_params(), ('matrix', 'embedding'),
                               (('layers/mlp/up', 'vector'),)))
  assert {n for n, decays in mask.items() if decays} == {
      'embed/embedding', 'position/embedding', 'layers/attention/query/kernel',
      'layers/attention/out/kernel', 'layers/mlp/down/kernel'}


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_states_are_float32_and_abstract(name):
  optimizer, params = OPTIMIZERS[name](learning_rate=schedules.constant(peak=0.1)), make_params()
  assert isinstance(optimizer, optax.GradientTransformation)
  abstract = jax.eval_shape(optimizer.init, params)
  state = jax.jit(optimizer.init)(params)
  assert jax.tree.structure(abstract) == jax.tree.structure(state)
  assert {x.dtype for x in jax.tree.leaves(state)} <= {np.dtype('float32'), np.dtype('int32')}
  chained = optax.chain(optimizer, optax.scale(2.0))
  once, twice = jax.jit(lambda p: (optimizer.update(p, state, p)[0],
                                   chained.update(p, chained.init(p), p)[0]))(params)
  for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True):
    np.testing.assert_allclose(2 * np.asarray(a), np.asarray(b), rtol=1e-6)


def test_learning_rate_is_the_one_applied():
  rate = schedules.cosine(peak=0.3, steps=5, warmup=2)
  optimizer = optim.sgd(learning_rate=rate, momentum=None, clip_norm=None)
  params = {'kernel': jnp.zeros(())}
  state = optimizer.init(params)
  for step in range(7):
    updates, state = optimizer.update({'kernel': jnp.ones(())}, state, params)
    assert -float(host(updates)['kernel']) == float(optimizer.learning_rate(step)) > 0 or step >= 5


def points(schedule, *steps):
  values = [schedule(step) for step in steps]
  traced = jax.jit(jax.vmap(schedule))(jnp.asarray(steps, jnp.int32))
  assert all(v.dtype == jnp.float32 and v.shape == () for v in values)
  np.testing.assert_allclose(np.asarray(traced), np.asarray(values), rtol=1e-6)
  return [float(v) for v in values]


@pytest.mark.parametrize('schedule, steps, wanted', [
    (schedules.constant(peak=2.0, warmup=4), (0, 1, 3, 4, 10**9), (0.5, 1, 2, 2, 2)),
    (schedules.constant(peak=2.0), (0, 5), (2, 2)),
    (schedules.linear(peak=1.0, steps=20, warmup=10, final=0.2), (4, 9, 10, 15, 20, 99),
     (0.5, 1, 1, 0.6, 0.2, 0.2)),
    (schedules.cosine(peak=1.0, steps=30, warmup=10, final=0.1), (9, 10, 15, 20, 30),
     (1, 1, 0.1 + 0.9 * (1 + 2**-0.5) / 2, 0.55, 0.1)),
    (schedules.rsqrt(peak=0.5, warmup=100), (0, 49, 99, 399, 9999),
     (0.005, 0.25, 0.5, 0.25, 0.05)),
    (schedules.wsd(peak=1.0, steps=100, warmup=10, decay=0.2), (4, 9, 50, 80, 85, 100),
     (0.5, 1, 1, 1, 0.5, 0)),
    (schedules.wsd(peak=1.0, steps=10, decay=1.0, final=0.5), (0, 9, 10),
     (1, 0.5 + 0.5 * (1 - 0.9**0.5), 0.5)),
    (schedules.linear(peak=1.0, steps=5, warmup=5), (0, 4), (0.2, 1))])
def test_schedules_at_known_points(schedule, steps, wanted):
  np.testing.assert_allclose(points(schedule, *steps), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('call, text', [
    (lambda: schedules.cosine(peak=1.0, steps=5, warmup=6), 'warmup=6 is longer than the whole'),
    (lambda: schedules.linear(peak=0.0, steps=5), 'peak=0.0; allowed are finite numbers above 0'),
    (lambda: schedules.linear(peak=1.0, steps=0), 'steps=0; allowed are integers from 1'),
    (lambda: schedules.cosine(peak=1.0, steps=5, final=2.0), 'final=2.0; allowed are fractions'),
    (lambda: schedules.constant(peak=1.0, warmup=-1), 'warmup=-1; allowed are integers from 0'),
    (lambda: schedules.rsqrt(peak=1.0, warmup=0), 'rsqrt: warmup=0; allowed are integers from 1'),
    (lambda: schedules.wsd(peak=1.0, steps=10, decay=0.0), 'decay=0.0; allowed are fractions'),
    (lambda: schedules.wsd(peak=1.0, steps=10, warmup=9), 'start at step 8, within the warm-up'),
    (lambda: optim.adamw(learning_rate=0.1, clip_norm=0.0), 'clip_norm=0.0; allowed are numbers'),
    (lambda: optim.adamw(learning_rate=0.1, weight_decay=-1), 'weight_decay=-1; allowed'),
    (lambda: optim.adamw(learning_rate=0.1, decay=(WRONG,)), r"decay=\('matrx',\); allowed"),
    (lambda: optim.adafactor(learning_rate=0.1, step_size=WRONG), "step_size='matrx'; allowed")])
def test_refuses_wrong_settings(call, text):
  with pytest.raises(ValueError, match=text):
    call()


def test_roles_cover_or_refuse():
  odd = {**make_params(), 'adapter': {'down_proj': jnp.ones((3, 4))}}
  with pytest.raises(ValueError, match="no role for 1 parameters: adapter/down_proj") as caught:
    jax.eval_shape(optim.adamw(learning_rate=0.1).init, odd)
  assert "roles=(('down_proj$', 'matrix'),)" in str(caught.value)
  fixed = optim.adamw(learning_rate=0.1, roles=(('down_proj$', 'matrix'),))
  jax.eval_shape(fixed.init, odd)
  with pytest.raises(ValueError, match=r"roles: 'mlp/dwn' matches no parameter \(nearest: .*down"):
    optim.adamw(learning_rate=0.1, roles=(('mlp/dwn', 'vector'),)).init(make_params())
  with pytest.raises(ValueError, match=r"roles: 'matrx' for 'x'; allowed .*nearest: matrix"):
    optim.adamw(learning_rate=0.1, roles=(('x', WRONG),)).init(make_params())
  with pytest.raises(ValueError, match="input_dims: 'nope' matches no parameter"):
    optim.muon(learning_rate=0.1, input_dims=(('nope', 2),)).init(make_params())
  vectors = {'layers': {'gate': {'kernel': jnp.ones((3, 4))}}}
  muon = optim.muon(learning_rate=0.1)
  with pytest.raises(ValueError, match=r'muon: layers/gate/kernel has shape \[3, 4\], after its'):
    muon.update(vectors, muon.init(vectors), vectors)
