"""The decoder: causal, blind across documents, and the same however it is executed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax import nnx

from models import attention, positions

VARIANTS = {
    'llama': {},
    'gpt': {'position': 'learned', 'norm': 'layernorm', 'mlp_form': 'plain',
            'activation': 'gelu_tanh', 'embeddings': 'tied',
            'biases': ('qkv', 'out', 'mlp', 'norm')},
    'mpt': {'position': 'alibi', 'norm': 'layernorm', 'mlp_form': 'plain', 'activation': 'gelu'},
    'falcon': {'block': 'parallel', 'kv_heads': 1, 'mlp_form': 'plain'},
    'neox': {'block': 'parallel', 'rope_fraction': 0.5, 'kv_heads': 2, 'biases': ('head',),
             'logit_softcap': 5.0},
}


def params_of(definition, seed=0):
  return nnx.to_pure_dict(nnx.state(definition.build(nnx.Rngs(params=seed)), nnx.Param))


def apply(definition, params, batch, **settings):
  graphdef = nnx.split(nnx.eval_shape(lambda: definition.build(nnx.Rngs(params=0))))[0]
  return nnx.merge(graphdef, params)(batch['inputs'], positions=batch['positions'],
                                     segment_ids=batch['segment_ids'], **settings)


@pytest.fixture(scope='module')
def batch():
  return {name: jnp.asarray(x) for name, x in toy.batch(2, 12).items()}


@pytest.mark.parametrize('name', VARIANTS)
def test_a_logit_depends_on_its_own_document_and_past_alone(name, batch):
  definition = toy.model(**VARIANTS[name])
  params = params_of(definition)
  graphdef = nnx.split(nnx.eval_shape(lambda: definition.build(nnx.Rngs(params=0))))[0]

  def probe(embedded_shift, at):
    # Shifting one input's embedding must move only logits of the same document from there on.
    module: Any = nnx.merge(graphdef, params)
    inner = module.embed
    module.embed = lambda tokens: inner(tokens) + embedded_shift
    if module.head is None:
      module.head = lambda x, axes: inner.attend(x)
    out = module(batch['inputs'], positions=batch['positions'], segment_ids=batch['segment_ids'])
    return jnp.sum(out[:, at] ** 2)

  shift = jnp.zeros((2, 12, 16))
  for at in (3, 7):
    moved = np.abs(np.asarray(jax.grad(probe)(shift, at))).max(-1)
    segments = np.asarray(batch['segment_ids'])
    allowed = (np.arange(12)[None] <= at) & (segments == segments[:, at:at + 1])
    assert (moved[~allowed] == 0).all()
    assert (moved[allowed] > 0).all()


@pytest.mark.parametrize('name', VARIANTS)
def test_scan_loop_and_remat_are_the_same_function(name, batch):
  settings = VARIANTS[name]
  reference = toy.model(**settings)
  params = params_of(reference)

  def grads(definition):
    return jax.jit(jax.value_and_grad(
        lambda p: jnp.sum(jnp.square(apply(definition, p, batch)))))(params)

  loss, wanted = grads(reference)
  for change in ({'layer_loop': 'scan'}, {'layer_loop': 'scan', 'remat': 'full'},
                 {'remat': 'dots_no_batch'}):
    other, found = grads(toy.model(**{**settings, **change}))
    np.testing.assert_allclose(other, loss, rtol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4),
                 wanted, found)


@pytest.mark.parametrize('name', VARIANTS)
def test_decoding_with_a_cache_equals_the_whole_row(name):
  definition = toy.model(**VARIANTS[name])
  module = definition.build(nnx.Rngs(params=0))
  tokens = jnp.asarray(toy.batch(2, 9)['targets'])
  whole = module(tokens)
  ones, index = jnp.ones((2, 9), jnp.int32), jnp.broadcast_to(jnp.arange(9)[None], (2, 9))
  out, cache = module.decode(tokens[:, :4], definition.empty_cache(2, 11),
                             positions=index[:, :4], segment_ids=ones[:, :4])
  parts = [out]
  for i in range(4, 9):
    out, cache = module.decode(tokens[:, i:i + 1], cache, positions=index[:, i:i + 1],
                               segment_ids=ones[:, i:i + 1])
    parts.append(out)
  np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=2e-5)


def test_grouped_heads_equal_full_heads_with_repeated_kernels(batch):
  grouped, full = toy.model(kv_heads=2), toy.model()
  params = params_of(grouped)
  wide = jax.tree.map(lambda x: x, params)
  for name in ('key', 'value'):
    kernel = params['layers']['attention'][name]['kernel']
    wide['layers']['attention'][name] = {'kernel': jnp.repeat(kernel, 2, 2)}
  np.testing.assert_allclose(apply(full, wide, batch), apply(grouped, params, batch), atol=1e-5)


def test_kernels_compute_the_same_function():
  keys = jax.random.split(jax.random.key(0), 3)
  q = jax.random.normal(keys[0], (2, 128, 4, 64))
  k, v = (jax.random.normal(key, (2, 128, 2, 64)) for key in keys[1:])
  segments = jnp.asarray(np.repeat([[1, 2]], 64, 1).reshape(1, 128).repeat(2, 0), jnp.int32)
  mask = attention.Mask(segments, segments)
  run = lambda kernel, bias=None, mask=mask, **settings: attention.attend(
      q, k, v, mask=mask, bias=bias, kernel=kernel, **settings)
  for wanted in (mask, attention.Mask(segments, segments, window=9, windowed=True),
                 attention.Mask(None, None, window=9, windowed=True)):
    for kernel in ('dot_product', 'splash'):
      np.testing.assert_allclose(run(kernel, mask=wanted), run('reference', mask=wanted), atol=5e-6)
  np.testing.assert_allclose(run('splash', softcap=2.0, scale=0.3),
                             run('reference', softcap=2.0, scale=0.3), atol=5e-6)
  bias = attention.alibi_bias(mask, 128, 128, jnp.asarray(positions.alibi_slopes(4)))
  np.testing.assert_allclose(run('dot_product', bias), run('reference', bias), atol=5e-6)
  with pytest.raises(ValueError, match="kernel='splash' has no bias such as ALiBi"):
    run('splash', bias)
  with pytest.raises(ValueError, match="kernel='dot_product' has no soft cap"):
    run('dot_product', softcap=2.0)


def test_attention_differentiated_by_rule_equals_tracing():
  keys = jax.random.split(jax.random.key(1), 5)
  q = jax.random.normal(keys[0], (2, 6, 4, 8))
  k, v = (jax.random.normal(key, (2, 6, 2, 8)) for key in keys[1:3])
  bias, weights = jax.random.normal(keys[3], (1, 4, 6, 6)), jax.random.normal(keys[4], q.shape)
  mask = attention.Mask(None, None, window=3, windowed=True)

  def traced(q, k, v, bias):
    scores = jnp.einsum('blhk,bshk->bhls', q, jnp.repeat(k, 2, 2))
    scores = jnp.tanh(scores / 1.5) * 1.5 + bias
    scores = jnp.where(mask.dense(6, 6), scores, attention.MASKED)
    out = jnp.einsum('bhls,bshk->blhk', jax.nn.softmax(scores, -1), jnp.repeat(v, 2, 2))
    return jnp.sum(out * weights)

  ruled = lambda q, k, v, bias: jnp.sum(
      weights * attention.reference(q, k, v, mask, bias, softcap=1.5))
  for got, wanted in zip(jax.grad(ruled, range(4))(q, k, v, bias),
                         jax.grad(traced, range(4))(q, k, v, bias), strict=True):
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_alibi_slopes():
  assert positions.alibi_slopes(8) == [2.0 ** -i for i in range(1, 9)]
  # 12 heads: eight of the power of two below, then every other one of the sixteen above.
  assert positions.alibi_slopes(12)[8:] == [2.0 ** (-0.5 * i) for i in (1, 3, 5, 7)]
  assert positions.alibi_slopes(2, most=6.0) == [2.0 ** -3, 2.0 ** -6]


def test_rounded_alibi_counts_places_in_each_document_and_rounds_twice():
  segments = jnp.array([[0, 0, 1, 1, 1, 2], [1, 1, 1, 1, 1, 1]], jnp.int32)
  slopes = jnp.asarray(positions.alibi_slopes(12), jnp.float32)
  bias = attention.rounded_alibi_bias(attention.Mask(segments, segments), 6, slopes)
  places = np.array([[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]])
  short = lambda x: np.asarray(x, jnp.bfloat16).astype(np.float32)
  wanted = short(short(slopes)[None, :, None] * places[:, None, :])
  np.testing.assert_array_equal(bias[:, :, 0], wanted)
  assert np.abs(wanted - np.asarray(slopes)[None, :, None] * places[:, None, :]).max() > 1e-3


def test_rotation_depends_on_the_distance_only():
  x, y = (jax.random.normal(jax.random.key(i), (1, 1, 1, 8)) for i in range(2))

  def score(i, j):
    turned = [positions.rotate(a, *positions.rotary_table(jnp.full((1, 1), p), 8, 10000.0))
              for a, p in ((x, i), (y, j))]
    return float(jnp.sum(turned[0] * turned[1]))

  assert score(5, 3) == pytest.approx(score(105, 103), abs=1e-4)
  assert abs(score(5, 3) - score(5, 4)) > 1e-2


def test_dropout_needs_a_key_and_follows_it(batch):
  definition = toy.model(dropout=0.5)
  params = params_of(definition)
  plain = apply(definition, params, batch)
  np.testing.assert_array_equal(plain, apply(toy.model(), params, batch))
  one, same, other = (apply(definition, params, batch, dropout_key=jax.random.key(i))
                      for i in (1, 1, 2))
  np.testing.assert_array_equal(one, same)
  assert np.abs(one - other).max() > 0.02 and np.abs(one - plain).max() > 0.02


def test_bfloat16_compute_keeps_float32_parameters_softmax_and_logits(batch):
  definition = toy.model(dtype='bfloat16')
  params = params_of(definition)
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype('float32')}
  logits = apply(definition, params, batch)
  assert logits.dtype == jnp.float32
  np.testing.assert_allclose(logits, apply(toy.model(), params, batch), atol=0.02)
  text = str(jax.make_jaxpr(lambda p: apply(definition, p, batch))(params))
  exponentials = [line for line in text.splitlines() if '= exp ' in line]
  assert exponentials and all('f32' in line for line in exponentials)


def test_a_row_longer_than_the_learned_positions_is_refused():
  definition = toy.model(position='learned', max_length=8)
  with pytest.raises(ValueError, match='row of 9 tokens exceeds max_length=8'):
    definition.build(nnx.Rngs(params=0))(jnp.zeros((1, 9), jnp.int32))


@pytest.mark.parametrize('loop', ['scan', 'unroll'])
def test_scores_divided_by_depth_are_those_of_smaller_queries(loop, batch):
  said = dict(VARIANTS['gpt'], layers=3, layer_loop=loop)
  params = params_of(toy.model(**said))
  found = apply(toy.model(**said, attention_depth='inverse'), params, batch)
  query = params['layers']['attention']['query']
  for name in query:
    query[name] = query[name] / jnp.arange(1.0, 4.0).reshape(3, *[1] * (query[name].ndim - 1))
  wanted = apply(toy.model(**said), params, batch)
  np.testing.assert_allclose(found, wanted, atol=1e-5)
