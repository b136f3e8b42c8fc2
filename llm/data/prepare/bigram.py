"""An interpolated bigram model, whose loss any trained model has to beat.

P(w | v) = lambda c(v, w) / c(v) + (1 - lambda) (c(w) + 1) / (n + V)   (Jelinek & Mercer 1980), with
lambda by expectation maximisation on the last tenth of the training tokens, counts from the rest;
then counts from all training tokens. A context v never seen in training falls back on the unigram.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llm.errors import require

LARGEST = 100_000_000  # training tokens up to which the model is counted
HELD_OUT = 0.1
EM_STEPS = 30


class _Counts:
    """Unigram and bigram counts of a token sequence."""

    def __init__(self, tokens: NDArray[np.int64], vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.pairs, self.pair_counts = np.unique(tokens[:-1] * vocab_size + tokens[1:], return_counts=True)
        self.contexts = np.bincount(tokens[:-1], minlength=vocab_size)
        self.unigrams = np.bincount(tokens, minlength=vocab_size)

    def probabilities(self, tokens: NDArray[np.int64]) -> tuple[NDArray, NDArray, NDArray]:
        """For each token but the first: bigram and unigram probability, and whether v was seen."""
        context, target = tokens[:-1], tokens[1:]
        key = context * self.vocab_size + target
        at = np.minimum(np.searchsorted(self.pairs, key), self.pairs.size - 1)
        count = np.where(self.pairs[at] == key, self.pair_counts[at], 0)
        total = self.contexts[context]
        unigram = (self.unigrams[target] + 1) / (self.unigrams.sum() + self.vocab_size)
        return count / np.maximum(total, 1), unigram, total > 0


def _estimate_lambda(tokens: NDArray[np.int64], vocab_size: int) -> float:
    cut = max(2, int(tokens.size * (1 - HELD_OUT)))
    bigram, unigram, seen = _Counts(tokens[:cut], vocab_size).probabilities(tokens[cut - 1 :])
    if not seen.any():
        return 0.0
    bigram, unigram = bigram[seen], unigram[seen]
    weight = 0.5
    for _ in range(EM_STEPS):
        mixed = weight * bigram
        weight = float(np.mean(mixed / (mixed + (1 - weight) * unigram)))
    return min(weight, 1 - 1e-6)  # 1 would give an unseen pair no probability at all


def bigram_loss(
    train_tokens: NDArray[np.integer], validation_tokens: NDArray[np.integer], vocab_size: int, seq_len: int
) -> float:
    """Mean loss, in nats per token, over the target tokens of the validation samples of seq_len.

    Both are 1-D arrays of ids below vocab_size; the targets are validation tokens 1 .. N seq_len.
    """
    n_samples = (validation_tokens.size - 1) // seq_len
    require(train_tokens.size >= 3, "a bigram model needs at least 3 training tokens")
    require(n_samples >= 1, f"{validation_tokens.size} validation tokens hold no sample of {seq_len} + 1")
    train = train_tokens.astype(np.int64)
    weight = _estimate_lambda(train, vocab_size)
    validation = validation_tokens[: n_samples * seq_len + 1].astype(np.int64)
    bigram, unigram, seen = _Counts(train, vocab_size).probabilities(validation)
    weights = np.where(seen, weight, 0.0)
    return float(-np.log(weights * bigram + (1 - weights) * unigram).mean())


def folder_loss(folder: Path, dtype: str, vocab_size: int, seq_len: int) -> float | None:
    """The loss on train.bin and validation.bin of a folder; None: too large a corpus, or no sample of seq_len."""
    train, validation = (
        np.memmap(folder / f"{split}.bin", np.dtype(dtype).newbyteorder("<"), "r") for split in ("train", "validation")
    )
    if train.size > LARGEST or validation.size <= seq_len:
        return None
    return bigram_loss(train, validation, vocab_size, seq_len)
