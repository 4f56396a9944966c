"""What is hidden from a row: keyed, exact in its shares, and never lost between the two sides."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_t5x_like_data_loader import make, write

from t5x_like.data import denoising

KNOWN = denoising.Vocabulary(size=1000, sentinels=100, pad_id=0, bos_id=0, eos_id=1)


def _rng(row: int = 0) -> np.random.Generator:
  return denoising.keyed(0, source='a', epoch=0, row=row)


def _batch(*documents: int, length: int) -> denoising.Batch:
  """One row of documents of these sizes, tokens 100, 101, ..."""
  used = sum(documents)
  tokens = np.zeros((1, length), np.int32)
  tokens[0, :used] = np.arange(100, 100 + used)
  segments = np.zeros((1, length), np.int32)
  segments[0, :used] = np.repeat(np.arange(len(documents)) + 1, documents)
  return {'inputs': tokens, 'targets': tokens, 'segment_ids': segments,
          'positions': np.zeros_like(tokens), 'loss_weights': (segments > 0).astype(np.float32)}


def _rebuilt(read: np.ndarray, write: np.ndarray, first: int) -> list[int]:
  """The document that a span corruption came from."""
  sentinel = lambda token: token > 900
  spans = {int(part[0]): part[1:].tolist() for part in np.split(
      write, np.flatnonzero(sentinel(write))) if len(part)}
  assert list(spans) == [first - i for i in range(len(spans))]
  return [t for token in read.tolist() for t in (spans[token] if sentinel(token) else [token])]


@settings(deadline=None, max_examples=60)
@given(length=st.integers(2, 300), density=st.floats(0.05, 0.6), mean=st.floats(1, 10),
       row=st.integers(0, 99))
def test_spans_and_what_is_read_make_up_the_document(length, density, mean, row):
  way = denoising.SpanCorruption(density=density, mean_span=mean)
  tokens = np.arange(100, 100 + length, dtype=np.int32)
  read, write = way.pair(tokens, _rng(row), first=999)
  hidden, spans = way.counts(length)
  if 999 - spans > 900:
    assert _rebuilt(read, write, 999) == tokens.tolist()
  assert (len(read), len(write)) == (length - hidden + spans, hidden + spans)


def test_t5s_own_numbers():
  """512 tokens at density 0.15 and mean span 3: 77 hidden in 26 spans (arXiv:1910.10683)."""
  way = denoising.SpanCorruption()
  assert way.counts(512) == (77, 26)
  spec = way.spec(4, length=512)
  assert spec['encoder_inputs'][0] == (4, 512) and spec['targets'][0] == (4, 104)


@pytest.mark.parametrize('way', [
    denoising.SpanCorruption(), denoising.PrefixLM(), denoising.Mixture(),
    denoising.Mixture(modes=tuple(range(50, 57)), weights=(1, 0, 0, 0, 0, 0, 2)),
    denoising.SpanCorruption(targets_length=30), denoising.MaskedLM(mask_id=7)])
def test_features_have_the_shapes_of_the_spec(way):
  batch = _batch(20, 1, 13, length=40)
  made = way.apply(batch, rngs=[_rng()], vocabulary=KNOWN)
  spec = way.spec(1, length=40)
  assert {n: (a.shape, a.dtype) for n, a in made.items()} == spec


def test_both_sides_are_packed_under_the_same_segments():
  way = denoising.SpanCorruption(targets_length=30)
  made = way.apply(_batch(20, 1, 13, length=40), rngs=[_rng()], vocabulary=KNOWN)
  for number, (first, size) in enumerate(((100, 20), (121, 13)), 1):
    read = made['encoder_inputs'][made['encoder_segment_ids'] == number]
    write = made['targets'][made['segment_ids'] == number]
    assert read[-1] == write[-1] == KNOWN.eos_id
    assert _rebuilt(read[:-1], write[:-1], 999) == list(range(first, first + size))
    shown = made['inputs'][made['segment_ids'] == number]
    assert shown.tolist() == [KNOWN.bos_id, *write[:-1].tolist()]
    assert made['positions'][made['segment_ids'] == number].tolist() == list(range(len(write)))
  assert made['segment_ids'].max() == made['encoder_segment_ids'].max() == 2
  assert ((made['loss_weights'] > 0) == (made['segment_ids'] > 0)).all()


def test_documents_whose_targets_do_not_fit_are_left_out_on_both_sides():
  made = denoising.SpanCorruption(targets_length=6).apply(
      _batch(20, 13, length=40), rngs=[_rng()], vocabulary=KNOWN)
  assert made['segment_ids'].max() == made['encoder_segment_ids'].max() == 1
  assert 100 <= made['encoder_inputs'][0, 0] < 120


def test_a_mixture_begins_with_its_mode_and_takes_ways_by_weight():
  way = denoising.Mixture(modes=tuple(range(50, 57)), weights=(1, 0, 0, 0, 0, 0, 3))
  batch = {k: np.repeat(v, 400, 0) for k, v in _batch(40, length=41).items()}
  made = way.apply(batch, rngs=[_rng(i) for i in range(400)], vocabulary=KNOWN)
  modes, counts = np.unique(made['encoder_inputs'][:, 0], return_counts=True)
  assert modes.tolist() == [50, 56] and 70 < counts[0] < 130


def test_masked_tokens_have_berts_shares():
  batch = {k: np.repeat(v, 200, 0) for k, v in _batch(100, length=128).items()}
  made = denoising.MaskedLM(mask_id=7).apply(batch, rngs=[_rng(i) for i in range(200)],
                                             vocabulary=KNOWN)
  chosen = made['loss_weights'] > 0
  assert (chosen.sum(1) == 15).all() and not chosen[:, 100:].any()
  assert (made['targets'] == batch['targets']).all()
  assert (made['inputs'][~chosen] == batch['targets'][~chosen]).all()
  shares = [np.mean(made['inputs'][chosen] == 7),
            np.mean(made['inputs'][chosen] == made['targets'][chosen])]
  np.testing.assert_allclose(shares, [0.8, 0.1], atol=0.03)


WAYS = (denoising.MaskedLM(mask_id=7), denoising.SpanCorruption(), denoising.Mixture())


@pytest.mark.parametrize('way', WAYS)
def test_a_row_does_not_depend_on_what_else_is_read(tmp_path, way):
  """Seeking, reading some rows, and another loader give the same; another epoch does not."""
  write(tmp_path, 'a', [30, 40, 50], extra_ids=100)
  options = {'length': 20, 'denoising': way, 'batch_size': 6, 'period': 6}
  loader = make(tmp_path, 'a', **options)
  whole = loader.batch(3)
  again = make(tmp_path, 'a', **options).batch(3, rows=[4, 1])
  for name, (shape, dtype) in loader.spec.items():
    assert whole[name].shape == shape and whole[name].dtype == dtype
    np.testing.assert_array_equal(whole[name][[4, 1]], again[name])
  epochs = [loader.batch(k) for k in range(2)]
  rows = [{tuple(np.sort(b['targets'][i]).tolist()) for i in range(6)} for b in epochs]
  assert rows[0] != rows[1] or not np.array_equal(epochs[0]['inputs'], epochs[1]['inputs'])


def test_the_fingerprint_knows_what_is_hidden(tmp_path):
  write(tmp_path, 'a', [30], extra_ids=100)
  found = {make(tmp_path, 'a', denoising=way).fingerprint for way in (None, *WAYS)}
  assert len(found) == 4


@pytest.mark.parametrize('call, text', [
    (lambda: denoising.MaskedLM(mask_id=7, rate=0), r'MaskedLM.rate=0 must be in \(0, 1\]'),
    (lambda: denoising.MaskedLM(mask_id=7, masked=0.9, random=0.2), 'at most 1 together'),
    (lambda: denoising.SpanCorruption(density=1), 'SpanCorruption.density=1 must be in'),
    (lambda: denoising.PrefixLM(share=1), 'PrefixLM.share=1 must be in'),
    (lambda: denoising.Mixture(weights=(1, 2)), 'Mixture.weights has 2 entries for 7 denoisers'),
    (lambda: denoising.MaskedLM(mask_id=1000).apply(
        _batch(4, length=4), rngs=[_rng()], vocabulary=KNOWN), 'mask_id=1000 is not in the'),
])
def test_settings_that_cannot_work_are_refused(call, text):
  with pytest.raises(ValueError, match=text):
    call()


def test_a_vocabulary_without_sentinels_is_refused(tmp_path):
  write(tmp_path, 'a', [30], extra_ids=2)
  assert make(tmp_path, 'a', length=20, denoising=denoising.PrefixLM()).batch(0)
  assert make(tmp_path, 'a', length=20, denoising=denoising.SpanCorruption(mean_span=2)).batch(0)
  with pytest.raises(ValueError, match='SpanCorruption needs 3 sentinels for rows of 20 tokens, '
                                       'but the vocabulary of .*a.train has 2: .*EXTRA_IDS=3 or '):
    make(tmp_path, 'a', length=20, denoising=denoising.SpanCorruption(mean_span=1))
