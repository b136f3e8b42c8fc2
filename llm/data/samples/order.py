"""The order of samples: a keyed permutation of 0..N-1 per epoch, computed on the fly.

A balanced Feistel network (Luby & Rackoff 1988) on the smallest even number of bits that holds N,
applied again until the value is below N (Black & Rogaway 2002). The round function is
splitmix64's finaliser (Steele et al. 2014). csrc/core/order.cpp computes the same numbers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llm.errors import require

ROUNDS = 8
GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment, 2^64 / golden ratio


def mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser, elementwise, modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mix_integer(x: int) -> int:
    return int(mix64(np.array([x % 2**64], dtype=np.uint64))[0])


def corpus_seed(seed: int, corpus: int) -> int:
    """The seed of the order of corpus number `corpus`; that of corpus 0 is the run's own."""
    return seed ^ _mix_integer(corpus)


def permute(indices: NDArray[np.integer], seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """Places of `indices` (each in 0..n-1) in the permutation of 0..n-1 keyed by (seed, epoch)."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half), np.uint64(2**half - 1)
    state = _mix_integer(_mix_integer(seed + GOLDEN) + epoch * GOLDEN)
    keys = [np.uint64(_mix_integer(state + (i + 1) * GOLDEN)) for i in range(ROUNDS)]
    out = indices.astype(np.uint64)
    walking = np.arange(out.size)
    while walking.size:
        left, right = out[walking] >> shift, out[walking] & mask
        for key in keys:
            left, right = right, left ^ (mix64(right ^ key) & mask)
        out[walking] = (left << shift) | right
        walking = walking[out[walking] >= np.uint64(n)]
    return out.astype(np.int64)


def sample_positions(seed: int, n_samples: int, first: int, count: int) -> NDArray[np.int64]:
    """Positions [count] in a corpus, in samples, of the samples first .. first + count - 1 of its order.

    Sample i belongs to epoch i // N and sits where the epoch's permutation puts i % N.
    """
    require(0 <= seed < 2**64, f"seed is {seed}; expected 0 <= seed < 2^64")
    require(1 <= n_samples <= 2**62, f"the data has {n_samples} samples; expected between 1 and 2^62")
    require(first >= 0 and first + count < 2**63, "sample numbers must stay below 2^63")
    out = np.empty(count, dtype=np.int64)
    done = 0
    while done < count:  # one turn per epoch that the range touches
        epoch, i = divmod(first + done, n_samples)
        n = min(n_samples - i, count - done)
        out[done : done + n] = permute(np.arange(i, i + n), seed, epoch, n_samples)
        done += n
    return out
