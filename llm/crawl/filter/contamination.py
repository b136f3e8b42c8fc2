"""Finds runs of words that evaluation data has too."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llm.crawl import _native
from llm.crawl.filter.page import Page
from llm.crawl.filter.settings import ContaminationRule
from llm.data.corpus import read_corpus
from llm.errors import require


class Contamination:
    """The hashes of all runs of words of the evaluation data: 12 bytes for each word of it."""

    def __init__(self, config: ContaminationRule) -> None:
        """Raises InputError where a file cannot be read or has no example that is long enough."""
        self._words = config.words
        self._names = [Path(path).stem for path in config.files]
        found = list[np.ndarray]()
        for path in config.files:
            found.append(
                np.concatenate([_native.ngrams(text, config.words) for text in read_corpus(path, config.text_key)])
            )
            require(len(found[-1]) > 0, f"{path} has no text of {config.words} words, filter.contamination.words")
        hashes = np.concatenate(found)
        sources = np.repeat(np.arange(len(found), dtype=np.uint32), [len(one) for one in found])
        self._hashes, first = np.unique(hashes, return_index=True)
        self._sources = sources[first]

    def __call__(self, page: Page) -> str:
        """The evaluation file, without its suffix, that a text shares a run of words with; "": none."""
        grams = _native.ngrams(page.text, self._words)
        places = np.minimum(np.searchsorted(self._hashes, grams), len(self._hashes) - 1)
        shared = np.flatnonzero(self._hashes[places] == grams)
        return self._names[self._sources[places[shared[0]]]] if len(shared) else ""
