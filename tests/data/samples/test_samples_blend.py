"""Blends: shares of a period, and Tijdeman's table, the same in C++ and Python."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm.data import _native
from llm.data.samples.blend import PERIOD, BlendTable, shares
from llm.errors import InputError

WEIGHTS = st.lists(st.floats(1e-6, 1e3), min_size=2, max_size=64)
FORMS = pytest.mark.parametrize("form", [BlendTable, _native.BlendTable], ids=["numpy", "native"])


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([5.0], (65536,)),
        ([1, 1], (32768, 32768)),
        ([1, 1, 1], (21846, 21845, 21845)),  # the lowest of equal remainders
        ([0.3, 0.7], (19661, 45875)),
        ([1e-300, 1e300], (1, 65535)),
        ([1, 65535, 1e-9], (1, 65534, 1)),
        ([1e-9, 2, 1e-9, 1], (1, 43689, 1, 21845)),  # 2/3 and 1/3 of what the small ones leave
    ],
)
def test_shares_by_hand(weights: list[float], expected: tuple[int, ...]):
    assert shares(weights) == expected


@given(WEIGHTS)
@settings(deadline=None)
def test_shares_are_the_weights_rounded(weights: list[float]):
    found = shares(weights)
    assert sum(found) == PERIOD and min(found) >= 1
    quotas = [Fraction(w) * PERIOD / sum(map(Fraction, weights)) for w in weights]
    if min(quotas) >= 1:
        remainders = [quota - int(quota) for quota in quotas]
        up = [share > quota for share, quota in zip(found, quotas, strict=True)]
        assert all(abs(share - quota) < 1 for share, quota in zip(found, quotas, strict=True))
        exact = [r for r, u in zip(remainders, up, strict=True) if not u]
        assert max(exact, default=Fraction(0)) <= min([r for r, u in zip(remainders, up, strict=True) if u], default=1)
    assert shares([w * 4 for w in weights]) == found  # only proportions count


def test_a_blend_of_too_many_or_of_nothing_is_refused():
    assert shares([1.0] * PERIOD) == (1,) * PERIOD
    assert min(shares([1e6, *[1.0] * (PERIOD - 1)])) == 1
    with pytest.raises(InputError, match="has 65537 corpora"):
        shares([1.0] * (PERIOD + 1))
    with pytest.raises(InputError, match="has 0 corpora"):
        shares([])
    with pytest.raises(InputError, match="expected above 0"):
        shares([1.0, 0.0])


def largest_deviation(found: tuple[int, ...], sources: np.ndarray) -> Fraction:
    """How far any source ever is from its exact share, over all prefixes, in samples."""
    places = np.arange(1, sources.size + 1)
    worst = max(int(np.abs(np.cumsum(sources == s) * PERIOD - places * share).max()) for s, share in enumerate(found))
    return Fraction(worst, PERIOD)


@given(WEIGHTS)
@example([0.9**i for i in range(64)])
@settings(max_examples=20, deadline=None)
def test_every_prefix_of_a_million_samples_is_within_tijdeman_s_bound(weights: list[float]):
    found = shares(weights)
    sources, _ = _native.BlendTable(found).entries(0, 10**6)
    assert largest_deviation(found, sources) <= 1 - Fraction(1, 2 * len(found) - 2)


@pytest.mark.parametrize("n", [2, 3, 64, 1000, PERIOD])
def test_equal_and_uneven_shares_are_within_the_bound(n: int):
    random = np.random.default_rng(n)
    for weights in ([1.0] * n, random.lognormal(0, 3, n).tolist()):
        found = shares(weights)
        sources, _ = _native.BlendTable(found).entries(0, PERIOD)
        assert np.array_equal(np.bincount(sources, minlength=n), found)
        few = np.argsort(found)[[0, n // 2, -1]]  # of a thousand sources, the smallest, the middle and the largest
        relevant = range(n) if n <= 64 else few
        for s in relevant:
            drawn, fair = np.cumsum(sources == s) * PERIOD, np.arange(1, PERIOD + 1) * found[s]
            assert np.abs(drawn - fair).max() * (2 * n - 2) <= PERIOD * (2 * n - 3)


@given(WEIGHTS, st.integers(0, 2**62), st.integers(0, 300))
@settings(max_examples=25, deadline=None)
def test_native_and_numpy_agree(weights: list[float], first: int, count: int):
    found = shares(weights)
    ours, native = BlendTable(found), _native.BlendTable(found)
    for start, n in ((first, count), (0, PERIOD)):
        for a, b in zip(ours.entries(start, n), native.entries(start, n), strict=True):
            assert a.dtype == b.dtype and np.array_equal(a, b)
    for source in (0, len(found) - 1):
        assert ours.count(source, first) == native.count(source, first)


@FORMS
@pytest.mark.parametrize("weights", [[1.0], [1, 2], [0.001, 5, 3, 3, 1e-7]])
def test_an_ordinal_counts_the_samples_before(form: type, weights: list[float]):
    table, n = form(shares(weights)), 2 * PERIOD + 100
    sources, ordinals = table.entries(0, n)
    for source in range(len(weights)):
        places = np.flatnonzero(sources == source)
        assert np.array_equal(ordinals[places], np.arange(places.size))
        for first in (0, 1, 777, PERIOD - 1, PERIOD, PERIOD + 1, n):
            assert table.count(source, first) == (places < first).sum()
    far, (source, ordinal) = 2**62 + 12_345, table.entries(2**62 + 12_345, 1)
    assert table.count(int(source[0]), far) == ordinal[0]


def test_two_equal_corpora_alternate_and_ties_go_to_the_first():
    assert BlendTable(shares([1, 1])).entries(0, 6)[0].tolist() == [0, 1, 0, 1, 0, 1]
    assert BlendTable(shares([1, 2, 1])).entries(0, 8)[0].tolist() == [1, 0, 1, 2, 1, 0, 1, 2]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ((0, 65536), "is 0"),
        ((1, 2), "sum to 3"),
        ((), "sum to 0"),
        ((65536, 1), "sum to 65537"),
        ((2**32 - 1, 65537), "sum"),
    ],
)
def test_shares_that_are_none_are_refused(bad: tuple[int, ...], message: str):
    with pytest.raises(InputError, match=message):
        BlendTable(bad)
    with pytest.raises(ValueError, match=message):
        _native.BlendTable(bad)


def test_an_unknown_source_has_no_count():
    with pytest.raises(IndexError, match="source 2 of a blend of 2"):
        _native.BlendTable(shares([1, 1])).count(2, 5)
