"""Encoder-decoders: packing, order, relative positions, cached reading, refused settings."""

import dataclasses

import golden_hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import config as config_lib
from models import encdec, positions

_STACK = config_lib.DecoderConfig(
    vocab=40, embed=16, layers=2, heads=2, mlp=24, position='relative', relative_buckets=8,
    relative_distance=12, dtype='float32', layer_loop='unroll')


@pytest.fixture(scope='module')
def t5():
  """A fixture's module as a function of all its inputs, and its parameters."""
  structure = golden_hf.structure('t5_v1_1', layer_loop='unroll')
  run = jax.jit(lambda params, read, write, a, b: structure.module(params)(
      read, write, encoder_segment_ids=a, segment_ids=b))
  return run, golden_hf.params('t5_v1_1', structure), structure


def test_packed_pairs_score_as_separate_ones(t5):
  run, params, _ = t5
  io = golden_hf.outputs('t5_v1_1')
  reads, writes = [io['input_ids'][0, :9], io['input_ids'][1, :6]], [
      io['decoder_input_ids'][0, :5], io['decoder_input_ids'][1, :8]]
  numbers = lambda parts: np.repeat([1, 2], [len(p) for p in parts]).astype(np.int32)[None]
  packed = run(params, np.concatenate(reads)[None], np.concatenate(writes)[None], numbers(reads),
               numbers(writes))
  at = 0
  for read, write in zip(reads, writes, strict=True):
    one = lambda x: np.ones((1, len(x)), np.int32)
    alone = run(params, read[None], write[None], one(read), one(write))
    np.testing.assert_allclose(packed[:, at:at + len(write)], alone, atol=2e-5)
    at += len(write)


def test_the_decoder_sees_no_later_token_and_the_encoder_all(t5):
  _, params, structure = t5
  read = jnp.arange(3, 9, dtype=jnp.int32)[None]
  write = jnp.arange(20, 25, dtype=jnp.int32)[None]

  def score(table):
    module = structure.module({**params, 'embed': {'embedding': table}})
    return jnp.sum(module(read, write)[0, 2])

  moved = np.abs(jax.jit(jax.grad(score))(params['embed']['embedding'])).max(-1) > 0
  assert moved[3:9].all() and moved[20:23].all() and not moved[23:25].any()


@pytest.mark.parametrize('order', ['causal', 'any'])
def test_relative_positions_are_those_of_the_plain_formula(order):
  """Against T5's own formula in float64, slot by slot, with and without an offset."""
  made = positions.RelativePositions(_STACK, nnx.Rngs(params=0), order)
  table = np.asarray(made.embedding[...])

  def bucket(distance: int) -> int:
    buckets, out = 8, 0
    if order == 'any':
      buckets //= 2
      out, distance = (buckets if distance > 0 else 0), abs(distance)
    else:
      distance = max(-distance, 0)
    exact = buckets // 2
    if distance < exact:
      return out + distance
    far = np.log(distance / exact) / np.log(12 / exact) * (buckets - exact)
    return out + min(exact + int(far), buckets - 1)

  for length, keys, offset in ((5, 5, 0), (1, 9, 6), (3, 30, 20)):
    wanted = np.array([[table[bucket(k - q - offset)] for k in range(keys)] for q in range(length)])
    found = jax.jit(made, static_argnums=(0, 1))(length, keys, jnp.int32(offset))
    np.testing.assert_array_equal(found[0], wanted.transpose(2, 0, 1))


def test_buckets_do_not_depend_on_rounding():
  """T5's 32 buckets up to 128: a boundary that is a whole number belongs to the later bucket."""
  near = positions.buckets_of(np.arange(200), buckets=16, longest=128)
  assert [int(np.flatnonzero(near == b)[0]) for b in range(16)] == [
      0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]


@pytest.mark.parametrize('changes, text', [
    ({'encoder': {'vocab': 41}}, 'encoder has vocab=41, but its decoder 40; they share it'),
    ({'encoder': {'embed': 32}}, 'encoder has embed=32, but its decoder 16'),
    ({'decoder': {'block': 'parallel'}}, "block='parallel'; reading an encoder needs 'serial'"),
])
def test_stacks_that_do_not_go_together_are_refused(changes, text):
  sides = {side: dataclasses.replace(_STACK, **changes.get(side, {}))
           for side in ('encoder', 'decoder')}
  with pytest.raises(ValueError, match=text):
    encdec.EncDecConfig(encoder=sides['encoder'], decoder=sides['decoder'])


def test_buckets_that_cannot_be_told_apart_are_refused():
  with pytest.raises(ValueError, match='relative_buckets=24 must be at least 4, and half of it '
                                       'below relative_distance=12'):
    dataclasses.replace(_STACK, relative_buckets=24)
  with pytest.raises(ValueError, match='relative_buckets=3 must be at least 4'):
    dataclasses.replace(_STACK, relative_buckets=3)


def test_flops_count_what_the_encoder_does():
  """By hand: products of both stacks and the head, scores of all three attentions."""
  config = encdec.EncDecConfig(encoder=_STACK, decoder=_STACK)
  attention, mlp = 4 * 16 * 16, 3 * 16 * 24
  products = 2 * (attention + mlp) + 2 * (2 * attention + mlp) + 16 * 40
  scores = 16 * 2 * (10 + 10 + 5.5)
  assert config.flops_per_token(10) == 6 * products + 12 * scores
