"""Shuffle quality: the sample order against NumPy's true permutations, by what a bad shuffle would show.

Each statistic is taken of as many of our permutations (one per seed) as of true ones, and its mean and its spread over
them are compared: |z| < 4.5 in a two-sample z-test. True permutations with other seeds would fail one such comparison
about once in 150,000 times (a normal tail; true against true, 7,200 comparisons of 100 draws followed it), and one of
this file's 72 about once in 2,000. The seeds are fixed, so that the outcome is too.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from llm.data import _native
from llm.data.samples import order
from llm.data.samples.order import corpus_seed, permute

LIMIT = 4.5
BINS = 8
Places = NDArray[np.int64]


def uniformity(places: Places) -> float:
    """Chi-square of where each eighth of the epoch goes."""
    n = places.size
    table = np.zeros((BINS, BINS))
    np.add.at(table, (np.arange(n) * BINS // n, places * BINS // n), 1)
    return float((table**2).sum())


def displacement(places: Places) -> float:
    """Chi-square of how far samples move."""
    n = places.size
    return float((np.bincount((places - np.arange(n)) % n * 16 // n, minlength=16) ** 2).sum())


def serial_correlation(places: Places, lag: int = 1) -> float:
    return float(np.corrcoef(places[:-lag], places[lag:])[0, 1])


def low_bits(places: Places) -> float:
    """Chi-square of the lowest bits of neighbours."""
    return float((np.bincount(places[:-1] % 4 * 4 + places[1:] % 4, minlength=16) ** 2).sum())


def ascents(places: Places) -> float:
    """Triples of neighbours in rising or falling order."""
    up = places[1:] > places[:-1]
    return float((up[1:] == up[:-1]).sum())


def half_block(places: Places) -> float:
    """Correlation at the distance at which the halves of the Feistel network repeat."""
    lag = 2 ** (((places.size - 1).bit_length() + 1) // 2)
    return serial_correlation(places, min(lag, places.size // 2))


STATISTICS = [uniformity, displacement, serial_correlation, low_bits, ascents, half_block]


def z_scores(ours: list[float], true: list[float]) -> tuple[float, float]:
    """Of the means and of the mean squared distances from the true mean."""

    def z(a: NDArray, b: NDArray) -> float:
        return float((a.mean() - b.mean()) / np.sqrt((a.var() + b.var()) / a.size + 1e-300))

    a, b = np.array(ours), np.array(true)
    return z(a, b), z((a - b.mean()) ** 2, (b - b.mean()) ** 2)


def compare(statistic: Callable[[Places], float], ours: Callable[[int], Places], n: int, draws: int) -> float:
    """The larger |z| of `draws` orders, one per seed, against as many true permutations."""
    random = np.random.default_rng(n)
    true = [statistic(random.permutation(n)) for _ in range(draws)]
    return max(map(abs, z_scores([statistic(ours(seed)) for seed in range(draws)], true)))


SIZES = [(50, 2000), (257, 2000), (1000, 1000), (4096, 500), (70_000, 100)]


@pytest.mark.parametrize("statistic", STATISTICS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("n", "draws"), SIZES)
def test_an_epoch_is_shuffled_like_a_true_permutation(statistic: Callable, n: int, draws: int):
    assert compare(statistic, lambda seed: _native.positions(seed, n, 0, n), n, draws) < LIMIT


@pytest.mark.parametrize("statistic", [uniformity, displacement], ids=lambda f: f.__name__)
@pytest.mark.parametrize("pair", ["epochs", "seeds", "corpora"])
def test_one_order_says_nothing_of_another(statistic: Callable, pair: str):
    """The places of one order by those of its neighbour: of the next epoch, the next seed, the next corpus."""
    n = 1000

    def relative(seed: int) -> Places:
        second = {
            "epochs": lambda: _native.positions(seed, n, n, n),
            "seeds": lambda: _native.positions(seed + 1, n, 0, n),
            "corpora": lambda: _native.positions(corpus_seed(seed, 1), n, 0, n),
        }[pair]()
        return second[np.argsort(_native.positions(seed, n, 0, n))]

    assert compare(statistic, relative, n, 1000) < LIMIT


def test_a_poor_shuffle_is_seen(monkeypatch: pytest.MonkeyPatch):
    """What the tests above guard against: too few rounds, a stride, a shuffle within a buffer."""
    n, draws = 1000, 300
    strided = [compare(f, lambda seed: (np.arange(n) * 387 + seed) % n, n, draws) for f in STATISTICS]

    def buffered(seed: int) -> Places:
        random = np.random.default_rng(seed)
        return np.concatenate([random.permutation(100) + i for i in range(0, n, 100)])

    windows = [compare(f, buffered, n, draws) for f in STATISTICS]
    assert max(strided) > 10 * LIMIT and max(windows) > 10 * LIMIT
    for rounds in (1, 2, 3):
        monkeypatch.setattr(order, "ROUNDS", rounds)
        found = [compare(f, lambda seed: permute(np.arange(n), seed, 0, n), n, draws) for f in STATISTICS]
        assert max(found) > 2 * LIMIT, rounds
