"""Tells good texts from bad ones by their words, as the user's examples teach it."""

from __future__ import annotations

from itertools import islice

import numpy as np

from llm.crawl import _native
from llm.crawl.filter.page import Page
from llm.crawl.filter.settings import QualityRule
from llm.data.corpus import read_corpus

RATE = 0.5  # of AdaGrad


class Quality:
    """A logistic regression. A text's features are which words and pairs of words it has, at length 1 in all."""

    def __init__(self, config: QualityRule) -> None:
        """Train on the examples: the same weights each time. Raises InputError where a file cannot be read."""
        self._config = config
        texts = [
            [self._features(text) for text in islice(read_corpus(path, config.text_key), config.examples)]
            for path in (config.good, config.bad)
        ]
        labels = np.repeat([1.0, 0.0], [len(kind) for kind in texts])
        examples = [one for kind in texts for one in kind]
        self._weights, self._bias = np.zeros(1 << config.bits, np.float32), 0.0
        squares, bias_squares = np.full(1 << config.bits, 1e-6, np.float32), 1e-6
        shares = np.where(labels == 1.0, len(texts[1]), len(texts[0])) / (len(examples) / 2)  # either kind counts half
        order = np.random.default_rng(0)
        for _ in range(config.passes):
            for i in order.permutation(len(examples)):
                error = float(shares[i] * (self._score(examples[i]) - labels[i]))
                step = error / np.sqrt(max(1, len(examples[i])))
                squares[examples[i]] += step * step
                self._weights[examples[i]] -= RATE * step / np.sqrt(squares[examples[i]])
                bias_squares += error * error
                self._bias -= RATE * error / bias_squares**0.5

    def __call__(self, page: Page) -> str:
        return "low_score" if self.score(page.text) < self._config.min_score else ""

    def score(self, text: str) -> float:
        """The probability that a text is good."""
        return self._score(self._features(text))

    def _score(self, features: np.ndarray) -> float:
        sum_ = self._bias + float(self._weights[features].sum()) / np.sqrt(max(1, len(features)))
        return float(1 / (1 + np.exp(-np.clip(sum_, -30, 30))))

    def _features(self, text: str) -> np.ndarray:
        grams = np.concatenate([_native.ngrams(text, 1), _native.ngrams(text, 2)])
        return np.unique(grams >> np.uint64(64 - self._config.bits)).astype(np.int64)
