"""The order of rows: permutations, exact rates, and maps that are each other's inverse."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_like.data import order

KEY = order.derive_key('test')


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), tweak=st.integers(0, 2**40), seed=st.integers())
def test_permute_is_a_permutation_and_inverts(size, tweak, seed):
  key = order.derive_key('test', seed)
  there = order.permute(np.arange(size), size=size, key=key, tweak=tweak)
  np.testing.assert_array_equal(np.sort(there), np.arange(size))
  back = order.permute(there, size=size, key=key, tweak=tweak, direction='backward')
  np.testing.assert_array_equal(back, np.arange(size))


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 2**52 - 1), data=st.data())
def test_permute_inverts_at_a_point_of_any_size(size, data):
  at = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=5)))
  there = order.permute(at, size=size, key=KEY)
  assert np.all((there >= 0) & (there < size))
  back = order.permute(there, size=size, key=KEY, direction='backward')
  np.testing.assert_array_equal(back, at)


def test_permute_takes_size_key_and_tweak_per_element():
  sizes, tweaks = np.array([3, 70, 10**9]), np.array([5, 0, 7])
  keys = np.stack([order.derive_key(i) for i in range(3)])
  at = np.array([2, 33, 123456789])
  together = order.permute(at, size=sizes, key=keys, tweak=tweaks)
  alone = [int(order.permute(at[i], size=int(sizes[i]), key=keys[i], tweak=int(tweaks[i])))
           for i in range(3)]
  assert together.tolist() == alone


@pytest.mark.parametrize('size', [1000, 4096, 30011])
def test_permute_leaves_no_serial_correlation(size):
  there = order.permute(np.arange(size), size=size, key=KEY).astype(float)
  for lag in (1, 2, 3, 64):
    correlation = np.corrcoef(there[:-lag], there[lag:])[0, 1]
    assert abs(correlation) < 4 / np.sqrt(size)
  assert abs(np.corrcoef(there, np.arange(size))[0, 1]) < 4 / np.sqrt(size)
  other = order.permute(np.arange(size), size=size, key=KEY, tweak=1)
  assert abs(np.corrcoef(there, other)[0, 1]) < 4 / np.sqrt(size)


def test_permute_spreads_files_over_steps():
  # 40 files of 500 neighbouring rows over 200 steps of 100 rows: 2.5 expected per file and step.
  there = order.permute(np.arange(20000), size=20000, key=KEY)
  counts = np.zeros((40, 200))
  np.add.at(counts, (there // 500, np.arange(20000) // 100), 1)
  chi_square = ((counts - 2.5)**2 / 2.5).sum()
  freedom = 39 * 199
  assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)


def test_permutations_of_four_are_equally_likely():
  there = order.permute(np.arange(4), size=4, key=KEY, tweak=np.arange(24000)[:, None])
  _, counts = np.unique(there, axis=0, return_counts=True)
  assert len(counts) == 24
  assert ((counts - 1000)**2 / 1000).sum() < 60  # chi-square, 23 degrees of freedom: p < 1e-4


def make_order(sizes, rates, *, batch_size=3, period=16, seed=0):
  return order.Order(sizes=sizes, keys={n: f'fingerprint of {n}' for n in sizes}, rates=rates,
                     batch_size=batch_size, period=period, seed=seed)


mixtures = st.dictionaries(st.sampled_from('abcdef'), st.integers(1, 40), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(sizes=mixtures, data=st.data(), seed=st.integers(0, 100), period=st.integers(32, 64))
def test_rates_hold_exactly_in_every_period_and_epochs_are_permutations(sizes, data, seed, period):
  rates = {n: data.draw(st.integers(2, 10)) for n in sizes}
  built = make_order(sizes, {0: rates}, period=period, seed=seed)
  expected = order.quantise(rates, total=period)
  source, epoch, row = built.rows(np.arange(period * 12))
  for q in range(12):
    counts = np.bincount(source[q * period:(q + 1) * period], minlength=len(sizes))
    assert dict(zip(built.names, counts.tolist(), strict=True)) == expected
  for i, name in enumerate(built.names):
    size = sizes[name]
    mine = row[source == i]
    np.testing.assert_array_equal(epoch[source == i], np.arange(len(mine)) // size)
    for e in range(len(mine) // size):
      np.testing.assert_array_equal(np.sort(mine[e * size:(e + 1) * size]), np.arange(size))


@settings(max_examples=40, deadline=None)
@given(sizes=mixtures, data=st.data(), step=st.integers(0, 10**12))
def test_forward_and_backward_are_inverse_over_phases(sizes, data, step):
  def some_rates():
    rates = {n: data.draw(st.sampled_from([0, 2, 3])) for n in sizes}
    return rates if any(rates.values()) else dict.fromkeys(sizes, 1)

  built = make_order(sizes, {0: some_rates(), 20: some_rates(), 50: some_rates()}, period=32)
  for first in (0, 3 * step):
    g = first + np.arange(200)
    source, epoch, row = built.rows(g)
    for i, name in enumerate(built.names):
      mine = source == i
      found = built.find(name, rows=row[mine], epochs=epoch[mine])
      np.testing.assert_array_equal(found, g[mine])


def test_phases_begin_at_a_period_and_ordinals_continue():
  built = make_order({'a': 10, 'b': 7}, {0: {'a': 1, 'b': 1}, 5: {'a': 3, 'b': 1}, 11: {'a': 1}})
  assert [f.first for f in built.phases] == [0, 1, 3]
  source, epoch, row = built.rows(np.arange(16 * 6))
  a_rows = np.bincount(np.arange(16 * 6)[source == 0] // 16, minlength=6)
  assert a_rows.tolist() == [8, 12, 12, 16, 16, 16]
  for i, size in enumerate((10, 7)):
    mine = source == i
    np.testing.assert_array_equal(epoch[mine], np.arange(mine.sum()) // size)
    assert len(set(row[mine][:size])) == size
  assert built.find('b', rows=np.array([3]), epochs=np.array([50])).tolist() == [-1]


def test_consumed_counts_rows_before():
  built = make_order({'a': 10, 'b': 7}, {0: {'a': 1, 'b': 1}, 11: {'a': 3, 'b': 1}})
  for g in (0, 1, 15, 16, 40, 77):
    source, _, _ = built.rows(np.arange(g))
    assert list(built.consumed(g).values()) == np.bincount(source, minlength=2).tolist()


def test_another_source_leaves_the_order_of_the_others():
  def rows_by_ordinal(rates):
    built = make_order({n: 9 for n in rates}, {0: rates})
    source, ordinal = built._ordinals(np.arange(16 * 8))
    _, _, row = built.rows(np.arange(16 * 8))
    mine = source == built.names.index('a')
    return dict(zip(ordinal[mine].tolist(), row[mine].tolist(), strict=True))

  alone, mixed = rows_by_ordinal({'a': 1}), rows_by_ordinal({'0': 2, 'a': 1, 'b': 1})
  assert len(mixed) == 32 and mixed == {i: alone[i] for i in mixed}


def test_seed_source_and_epoch_change_the_order():
  def epochs(seed, name):
    built = make_order({name: 50}, {0: {name: 1}}, seed=seed)
    g = built.find(name, rows=np.tile(np.arange(50), 2), epochs=np.repeat([0, 1], 50))
    return tuple(g[:50]), tuple(g[50:] - 50)

  assert len({*epochs(0, 'a'), *epochs(1, 'a'), *epochs(0, 'b')}) == 6


def test_quantise_reports_what_to_do_about_a_lost_source():
  assert order.quantise({'b': 1, 'a': 2, 'c': 0}, total=10) == {'a': 7, 'b': 3, 'c': 0}
  with pytest.raises(ValueError, match="source 'b' with rate 0.001 would get 0 of the 100 rows of "
                                       'a period; set period to 1001 or more'):
    order.quantise({'a': 1, 'b': 0.001}, total=100)
  assert order.quantise({'a': 1, 'b': 0.001}, total=1001)['b'] == 1
  with pytest.raises(ValueError, match='no source has a positive rate'):
    order.quantise({'a': 0}, total=10)
  with pytest.raises(ValueError, match="rate of source 'a' is -1: rates are finite and >= 0"):
    order.quantise({'a': -1, 'b': 2}, total=10)


def test_changes_without_effect_and_unknown_sources_are_refused():
  with pytest.raises(ValueError, match='step 2 would begin in the same period of 16 rows'):
    make_order({'a': 10, 'b': 3}, {0: {'a': 1}, 1: {'b': 1}, 2: {'a': 1}})
  with pytest.raises(ValueError, match="unknown source 'wikki'; did you mean 'wiki'"):
    make_order({'wiki': 10, 'code': 3}, {0: {'wiki': 1}, 100: {'wikki': 1}})
