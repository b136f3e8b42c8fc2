"""The sample order: a permutation, the same in C++ and NumPy, different per epoch and seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.data import _native
from llm.data.samples.order import corpus_seed, mix64, permute, sample_positions
from llm.errors import InputError

SIZES = [1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 63, 64, 65, 255, 256, 257, 1000, 4095, 4096, 4097, 65537]


def test_mix64_is_splitmix64():
    # The first outputs of splitmix64 from state 1234567 (Vigna's reference implementation).
    states = np.uint64(1234567) + np.arange(1, 6, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert mix64(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_the_order_of_a_seed_is_for_ever():
    """A run that is resumed with a later version must go on in the order it began in."""
    assert sample_positions(1234, 10, 0, 20).tolist() == [5, 8, 3, 7, 4, 9, 2, 0, 1, 6, 1, 3, 4, 5, 0, 9, 8, 6, 7, 2]
    assert sample_positions(1234, 10**6, 999_998, 4).tolist() == [347911, 407100, 665702, 595107]
    assert sample_positions(2**64 - 1, 2**62, 2**62, 2).tolist() == [502648295972854655, 4398783239886934442]


@pytest.mark.parametrize("n", SIZES)
def test_each_epoch_is_a_permutation(n: int):
    for seed, epoch in [(0, 0), (1, 0), (2**64 - 1, 3)]:
        places = permute(np.arange(n), seed, epoch, n)
        assert np.array_equal(np.sort(places), np.arange(n))


@given(
    n=st.integers(1, 2**62),
    seed=st.integers(0, 2**64 - 1),
    first=st.integers(0, 2**63 - 200),
    count=st.integers(0, 50),
)
@settings(max_examples=200, deadline=None)
def test_native_and_numpy_agree(n: int, seed: int, first: int, count: int):
    ours = sample_positions(seed, n, first, count)
    assert np.array_equal(ours, _native.positions(seed, n, first, count))
    assert ours.size == 0 or (ours.min() >= 0 and ours.max() < n)


@pytest.mark.parametrize("n", [1, 2, 10, 97])
def test_a_range_over_epochs_is_the_epochs_joined(n: int):
    expected = np.concatenate([permute(np.arange(n), 5, epoch, n) for epoch in range(4)])
    assert np.array_equal(sample_positions(5, n, 0, 4 * n), expected)
    assert np.array_equal(sample_positions(5, n, n - 1, n + 2), expected[n - 1 : 2 * n + 1])
    assert np.array_equal(_native.positions(5, n, n - 1, n + 2), expected[n - 1 : 2 * n + 1])


@pytest.mark.parametrize("n", [1, 3, 33, 70, 257, 4097])
def test_native_gives_the_same_however_a_range_is_cut(n: int):
    """The native order permutes samples in blocks, whose edges must not show."""
    whole = sample_positions(7, n, 0, 3 * n)
    for count in (1, 2, 3, 7, 8, 9, 31, 32, 33, 64, 65, 3 * n):
        cuts = [_native.positions(7, n, at, min(count, 3 * n - at)) for at in range(0, 3 * n, count)]
        assert np.array_equal(np.concatenate(cuts), whole), count


def test_each_corpus_has_its_own_order():
    assert corpus_seed(99, 0) == 99
    seeds = [corpus_seed(99, corpus) for corpus in range(1000)]
    assert len(set(seeds)) == 1000 and all(0 <= seed < 2**64 for seed in seeds)


def test_epochs_and_seeds_differ():
    n = 1000
    orders = [permute(np.arange(n), seed, epoch, n) for seed in (1, 2) for epoch in (0, 1)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a == b).mean() < 0.02


@pytest.mark.parametrize("n", [6, 50])
def test_places_are_uniform_over_seeds(n: int):
    draws = 4000
    counts = np.zeros((n, n))
    for seed in range(draws):
        counts[np.arange(n), permute(np.arange(n), seed, 0, n)] += 1
    expected = draws / n
    chi2 = ((counts - expected) ** 2 / expected).sum()
    freedom = (n - 1) ** 2
    assert abs(chi2 - freedom) < 5 * np.sqrt(2 * freedom)


def test_impossible_orders_are_refused():
    with pytest.raises(InputError, match="seed is -1"):
        sample_positions(-1, 5, 0, 1)
    with pytest.raises(InputError, match="has 0 samples"):
        sample_positions(1, 0, 0, 1)
    with pytest.raises(InputError, match="below 2\\^63"):
        sample_positions(1, 5, 2**63 - 2, 5)
    with pytest.raises(ValueError, match="between 1 and 2\\^62"):
        _native.positions(1, 0, 0, 1)
    with pytest.raises(IndexError, match="below 2\\^63"):
        _native.positions(1, 5, 2**63 - 2, 5)
