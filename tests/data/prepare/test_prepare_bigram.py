"""The bigram baseline against a model written out with dictionaries."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from llm.data.prepare.bigram import bigram_loss
from llm.errors import InputError


def brute_force(train: list[int], validation: list[int], vocab_size: int, seq_len: int) -> float:
    def model(tokens, weight):
        pairs = Counter(pairwise(tokens))
        contexts, unigrams = Counter(tokens[:-1]), Counter(tokens)

        def probability(v, w):
            unigram = (unigrams[w] + 1) / (len(tokens) + vocab_size)
            if not contexts[v]:
                return 0.0, unigram, unigram
            bigram = pairs[v, w] / contexts[v]
            return bigram, unigram, weight * bigram + (1 - weight) * unigram

        return probability, contexts

    cut = max(2, int(len(train) * 0.9))
    probability, contexts = model(train[:cut], 0.0)
    held_out = [probability(v, w) for v, w in zip(train[cut - 1 :], train[cut:], strict=False) if contexts[v]]
    weight = 0.5 if held_out else 0.0
    for _ in range(30 if held_out else 0):
        shares = [weight * b / (weight * b + (1 - weight) * u) for b, u, _ in held_out]
        weight = sum(shares) / len(shares)
    weight = min(weight, 1 - 1e-6)
    probability, _ = model(train, weight)
    for v in range(vocab_size):  # a distribution, also after a context never seen
        assert sum(probability(v, w)[2] for w in range(vocab_size)) == pytest.approx(1)
    targets = (len(validation) - 1) // seq_len * seq_len
    losses = [-math.log(probability(validation[i], validation[i + 1])[2]) for i in range(targets)]
    return sum(losses) / targets


@pytest.mark.parametrize(("n", "vocab_size", "seq_len"), [(3, 4, 1), (40, 5, 3), (500, 12, 7), (2000, 60, 64)])
def test_against_brute_force(n: int, vocab_size: int, seq_len: int):
    rng = np.random.default_rng(n)
    steps = rng.choice(vocab_size - 1, p=rng.dirichlet(np.ones(vocab_size - 1) * 0.2), size=n)
    train = np.cumsum(steps) % (vocab_size - 1)  # the last id never occurs
    validation = np.concatenate([train[::-1][: n // 2], [vocab_size - 1], train[:200]])
    expected = brute_force(train.tolist(), validation.tolist(), vocab_size, seq_len)
    found = bigram_loss(train.astype("<u2"), validation.astype("<u2"), vocab_size, seq_len)
    assert found == pytest.approx(expected, rel=1e-12)


def test_a_deterministic_chain_costs_nothing():
    chain = np.tile(np.arange(50), 40)
    assert bigram_loss(chain, chain[:301], 50, 100) < 1e-4


def test_large_vocabularies_do_not_overflow():
    tokens = np.array([49_999, 49_998, 0] * 20, dtype=np.uint16)
    assert 0 < bigram_loss(tokens, tokens, 50_000, 10) < 0.1


def test_noise_costs_its_entropy():
    rng = np.random.default_rng(0)
    train, validation = rng.integers(0, 8, 100_000), rng.integers(0, 8, 10_001)
    assert bigram_loss(train, validation, 8, 100) == pytest.approx(math.log(8), abs=0.01)


def test_too_few_tokens_are_refused():
    with pytest.raises(InputError, match="at least 3"):
        bigram_loss(np.array([1, 2]), np.arange(10), 20, 3)
    with pytest.raises(InputError, match="hold no sample"):
        bigram_loss(np.arange(10), np.arange(3), 20, 3)
