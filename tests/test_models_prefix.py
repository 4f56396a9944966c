"""Prefix LM in a decoder: what is seen in both directions, packed, cached, and by which kernels."""

from typing import Any

import jax
import numpy as np
import pytest
import toy

from models import attention
from t5x_like import losses, state
from t5x_like.data import denoising

# Two packed documents and padding; the first 4 and 2 tokens are their prefixes.
SEGMENTS: Any = np.array([[1] * 7 + [2] * 6 + [0] * 3], np.int32)
PREFIX: Any = np.array([[1] * 4 + [0] * 3 + [1] * 2 + [0] * 7], np.int32)
POSITIONS = np.array([[*range(7), *range(6), 0, 0, 0]], np.int32)
INPUTS = np.random.default_rng(0).integers(3, toy.VOCAB, (1, 16)).astype(np.int32)


def allowed(segments, prefix, window=None):
  """Who may attend to whom, written out query by query and key by key."""
  length = segments.shape[1]
  out = np.zeros((length, length), bool)
  for q in range(length):
    for k in range(length):
      near = window is None or abs(q - k) < window
      out[q, k] = segments[0, q] == segments[0, k] and near and (k <= q or prefix[0, k] > 0)
  return out


@pytest.mark.parametrize('window', [None, 3])
def test_the_mask_is_the_one_written_out(window):
  mask = attention.Mask(SEGMENTS, SEGMENTS, window=window, windowed=window is not None,
                        prefix=PREFIX)
  np.testing.assert_array_equal(mask.dense(16, 16)[0, 0], allowed(SEGMENTS, PREFIX, window))
  assert not attention.Mask(None, None, prefix=PREFIX).plain


def made(**settings):
  definition = toy.model(layers=2, **settings)
  described = toy.structure(definition)
  params = state.initial(definition, described, toy.optax.sgd(0.1), seed=1)['params']
  return definition, described, params


def test_tokens_see_what_the_mask_says_and_no_more():
  _, described, params = made(layer_loop='scan')
  run = jax.jit(lambda ids: described.module(params)(
      ids, positions=POSITIONS, segment_ids=SEGMENTS, prefix=PREFIX))
  base = np.asarray(run(INPUTS))
  sees = allowed(SEGMENTS, PREFIX)
  for key in range(13):
    changed = INPUTS.copy()
    changed[0, key] = 2
    moved = np.abs(np.asarray(run(changed)) - base).max(-1)[0] > 0
    np.testing.assert_array_equal(moved[:13], sees[:13, key], err_msg=str(key))


@pytest.mark.parametrize('position', ['rope', 'alibi', 'relative'])
def test_kernels_packing_and_the_cache_agree(position):
  definition, described, params = made(position=position, kernel='reference')
  whole = jax.jit(lambda ids, positions, segments, prefix: described.module(params)(
      ids, positions=positions, segment_ids=segments, prefix=prefix))
  packed = np.asarray(whole(INPUTS, POSITIONS, SEGMENTS, PREFIX))
  other = toy.structure(toy.model(layers=2, position=position, kernel='dot_product'))
  fused = other.module(params)(INPUTS, positions=POSITIONS, segment_ids=SEGMENTS, prefix=PREFIX)
  np.testing.assert_allclose(fused[:, :13], packed[:, :13], atol=2e-5)
  # The second document alone: its prefix is read at once, the rest token by token.
  document, module = INPUTS[:, 7:13], described.module(params)
  cache, ones = definition.empty_cache(1, 6), np.ones((1, 6), np.int32)
  logits, cache = module.decode(document[:, :2], cache, positions=POSITIONS[:, :2],
                                segment_ids=ones[:, :2], prefix=ones[:, :2])
  np.testing.assert_allclose(logits, packed[:, 7:9], atol=2e-5)
  for i in range(2, 6):
    logits, cache = module.decode(document[:, i:i + 1], cache, positions=POSITIONS[:, i:i + 1],
                                  segment_ids=ones[:, :1])
    np.testing.assert_allclose(logits[:, 0], packed[:, 7 + i], atol=2e-5)


def test_splash_refuses_a_prefix_by_name_and_auto_does_not_choose_it(monkeypatch):
  q: Any = np.zeros((1, 128, 2, 8), np.float32)
  ids: Any = np.ones((1, 128), np.int32)
  mask = attention.Mask(ids, ids, prefix=ids)
  with pytest.raises(ValueError, match="kernel='splash' has .*no prefix that is seen in both dir"):
    attention.attend(q, q, q, mask=mask, kernel='splash')
  monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
  assert attention.choose('auto', length=128, keys=128, mask=mask) == 'reference'
  causal = attention.Mask(ids, ids)
  assert attention.choose('auto', length=128, keys=128, mask=causal) == 'splash'


def rows(segments, weights=None):
  segments = np.array([segments], np.int32)
  real = (segments > 0).astype(np.float32)
  return {'inputs': np.zeros_like(segments), 'targets': np.arange(segments.size)[None] + 10,
          'segment_ids': segments, 'positions': np.zeros_like(segments),
          'loss_weights': real if weights is None else np.array([weights], np.float32)}


KNOWN = denoising.Vocabulary(size=100, sentinels=0, pad_id=0, bos_id=0, eos_id=1)


def test_the_inputs_of_a_store_are_the_prefix_as_in_seqio():
  # The example in the documentation of seqio.PrefixLMFeatureConverter.
  batch = rows([1] * 7 + [2] * 7 + [0], [0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 0])
  out = denoising.DecoderPrefixLM(share=None).apply(
      batch, rngs=[denoising.keyed(0, source='a', epoch=0, row=0)], vocabulary=KNOWN)
  assert out['prefix'][0].tolist() == [1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0]
  np.testing.assert_array_equal(out['loss_weights'], batch['loss_weights'])


def test_each_document_is_cut_where_its_targets_begin():
  batch = rows([1] * 9 + [2] + [3] * 4 + [0, 0])
  for seed in range(20):
    out = denoising.DecoderPrefixLM().apply(
        batch, rngs=[denoising.keyed(seed, source='a', epoch=0, row=0)], vocabulary=KNOWN)
    for document, size in ((1, 9), (2, 1), (3, 4)):
      here = batch['segment_ids'][0] == document
      seen, scored = out['prefix'][0, here], out['loss_weights'][0, here]
      at = int((scored == 0).sum())
      assert scored.tolist() == [0] * at + [1] * (size - at)
      assert seen.tolist() == ([1] * (at + 1) + [0] * (size - at - 1) if size > 1 else [0])
      assert size == 1 or 1 <= at < size
    assert not out['prefix'][0, -2:].any() and not out['loss_weights'][0, -2:].any()
  with pytest.raises(ValueError, match=r'DecoderPrefixLM.share=1 must be in \(0, 1\), or None'):
    denoising.DecoderPrefixLM(share=1)


def test_the_loss_reads_the_prefix():
  _, described, params = made()
  batch: Any = {'inputs': INPUTS, 'targets': INPUTS, 'positions': POSITIONS,
                'segment_ids': SEGMENTS, 'loss_weights': np.ones((1, 16), np.float32)}
  module = described.module(params)
  with_prefix, _, _ = losses.next_token(module, {**batch, 'prefix': PREFIX})
  none, _, _ = losses.next_token(module, {**batch, 'prefix': np.zeros_like(PREFIX)})
  plain, _, _ = losses.next_token(module, batch)
  assert float(none) == float(plain) != float(with_prefix)
