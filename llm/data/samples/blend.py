"""Says which corpus each sample of a blend is drawn from: a table of one period, read in O(1).

Tijdeman's rule (The chairman assignment problem, 1980): with n sources, no source ever is more than 1 - 1 / (2n - 2)
samples from its exact share of the samples drawn so far. No rule does better. csrc/core/blend.cpp does the same.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from llm.errors import require

PERIOD = 2**16  # samples after which the blend repeats


def shares(weights: Sequence[float]) -> tuple[int, ...]:
    """The samples of each corpus in a period: its weight's share of 2^16, to the largest remainder, at least 1.

    The weights need not sum to 1. The shares sum to 2^16.
    Raises InputError for more than 2^16 weights, or one that is not above 0.
    """
    possible = 1 <= len(weights) <= PERIOD
    require(possible, f"the blend has {len(weights)} corpora; expected 1 to {PERIOD}, join some of them")
    exact = [Fraction(weight) for weight in weights]
    require(min(exact) > 0, f"a weight of the blend is {min(weights)}; expected above 0")
    out = [1] * len(weights)
    large, left = list(range(len(weights))), PERIOD  # corpora that get what those of less than one sample leave
    while True:
        total = sum(exact[i] for i in large)
        kept = [i for i in large if exact[i] * left >= total]
        if len(kept) == len(large):
            break
        large, left = kept, PERIOD - len(weights) + len(kept)
    quotas = {i: exact[i] * left / total for i in large}
    for i, quota in quotas.items():
        out[i] = int(quota)
    by_remainder = sorted(large, key=lambda i: out[i] - quotas[i])  # stable: the lowest of equals first
    for i in by_remainder[: PERIOD - sum(out)]:
        out[i] += 1
    return tuple(out)


class BlendTable:
    """The twin of `_native.BlendTable`: in each period, source s has shares[s] samples."""

    def __init__(self, shares: Sequence[int]):
        require(sum(shares) == PERIOD, f"the shares of the blend sum to {sum(shares)}; expected {PERIOD}")
        require(min(shares) >= 1, "a share of the blend is 0; expected at least 1")
        self._shares = np.asarray(shares, dtype=np.int64)
        self._sources = _sources_of_period(shares)
        order = np.argsort(self._sources, kind="stable")
        self._slots = np.split(order, np.cumsum(self._shares)[:-1])  # of each source, in the period
        self._ordinals = np.empty(PERIOD, dtype=np.int64)
        for slots in self._slots:
            self._ordinals[slots] = np.arange(slots.size)

    def entries(self, first: int, count: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """(source, ordinal among its samples) of the blend's samples first .. first + count - 1, each [count]."""
        period, slot = np.divmod(np.arange(first, first + count), PERIOD)
        source = self._sources[slot]
        return source, period * self._shares[source] + self._ordinals[slot]

    def count(self, source: int, n: int) -> int:
        """Samples of `source` among the first n of the blend."""
        period, slot = divmod(n, PERIOD)
        return period * int(self._shares[source]) + int(np.searchsorted(self._slots[source], slot))


def _sources_of_period(shares: Sequence[int]) -> NDArray[np.int32]:
    """The sources of one period, [PERIOD].

    Sample j of a source (from 0) has a window of slots (from 1) in which it keeps the source within the bound: with
    share a of P, those k for which a k / P >= j + 1 / (2n - 2) and a (k - 1) / P <= j + 1 - 1 / (2n - 2). Of the
    samples whose window is open, the one whose window closes first is drawn, the lowest source of equals. That some
    order fits every window is Tijdeman's theorem, and for unit jobs the earliest deadline first then finds one.
    """
    if len(shares) == 1:
        return np.zeros(PERIOD, dtype=np.int32)
    slack = 2 * len(shares) - 2
    drawn = [0] * len(shares)

    def opens(s: int) -> int:
        return -(-(drawn[s] * slack + 1) * PERIOD // (slack * shares[s]))

    def closes(s: int) -> int:
        return ((drawn[s] + 1) * slack - 1) * PERIOD // (slack * shares[s]) + 1

    closed = [(opens(s), s) for s in range(len(shares))]
    open_: list[tuple[int, int]] = []
    heapq.heapify(closed)
    out = np.empty(PERIOD, dtype=np.int32)
    for slot in range(1, PERIOD + 1):
        while closed and closed[0][0] <= slot:
            s = heapq.heappop(closed)[1]
            heapq.heappush(open_, (closes(s), s))
        s = heapq.heappop(open_)[1]
        out[slot - 1] = s
        drawn[s] += 1
        heapq.heappush(closed, (opens(s), s))
    return out
