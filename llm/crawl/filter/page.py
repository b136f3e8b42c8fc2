"""A document on its way through the rules, and the counts of its text that they compare with their thresholds."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from llm.crawl import _native
from llm.crawl.counts import Counts
from llm.crawl.documents import Document
from llm.crawl.filter.settings import FilterConfig

TOP, DUPLICATE = (2, 3, 4), (5, 6, 7, 8, 9, 10)  # lengths of Gopher's n-grams


class Statistics(NamedTuple):
    """Counted by csrc/crawl/statistics.cpp, in one call. Characters are code points; words come from a tokenizer."""

    characters: int
    newlines: int
    """Line feeds."""
    hashes: int
    """# signs."""
    ellipses: int
    words: int
    """Signs among them."""
    plain_words: int
    """Those that are not signs alone."""
    plain_characters: int
    """Characters of the plain words."""
    letter_words: int
    """Words with a letter."""
    stop_words: int
    """Different ones."""
    lines: int
    """As str.splitlines() has them."""
    bullet_lines: int
    ellipsis_lines: int
    full_lines: int
    """Between line feeds, and not blank."""
    ended_lines: int
    """Full lines that end with a mark such as a full stop."""
    short_lines: int
    """Full lines of at most filter.fineweb.short_line characters."""
    repeated_full_characters: int
    """Characters of the full lines that have come before."""
    chunks: int
    """What lies between runs of line feeds; an empty one at an end counts."""
    repeated_chunks: int
    """Those that have come before."""
    repeated_chunk_characters: int
    paragraphs: int
    """What lies between empty lines."""
    repeated_paragraphs: int
    repeated_paragraph_characters: int
    top: tuple[int, ...]
    """Characters of the most frequent run of n words, all its occurrences, for each n of TOP; 0: there is no run."""
    duplicate: tuple[int, ...]
    """Characters of the runs of n words that have come before, for each n of DUPLICATE."""

    @classmethod
    def of(cls, counts: list[int], repeated: list[int]) -> Statistics:
        """What the extension returns; `repeated` is empty where n-grams were not asked for."""
        return cls._make([*counts, tuple(repeated[: len(TOP)]), tuple(repeated[len(TOP) :])])


class Tokenizer(NamedTuple):
    """Splits text. Another one than ours is for comparisons."""

    words: Callable[[str], list[str]] | None = None
    """None: the native one, which need not make strings."""
    sentences: Callable[[str], int] = _native.sentences


class Page:
    """One document."""

    def __init__(self, document: Document, config: FilterConfig, counts: Counts, tokenizer: Tokenizer) -> None:
        self.document, self.counts, self.tokenizer = document, counts, tokenizer
        self._config = config
        self._statistics: Statistics | None = None

    @property
    def text(self) -> str:
        return self.document.text

    def change(self, text: str) -> None:
        """Go on with another text."""
        if text != self.document.text:
            self.document.text, self._statistics = text, None

    def statistics(self, ngrams: bool = False) -> Statistics:
        """Of the present text. `ngrams`: top and duplicate are needed, which costs as much as all else."""
        if self._statistics is None or (ngrams and not self._statistics.top):
            words = self.tokenizer.words(self.text) if self.tokenizer.words else None
            stop_words, short_line = self._config.gopher_quality.stop_words, self._config.fineweb.short_line
            counts, repeated = _native.statistics(self.text, words, stop_words, short_line, ngrams)
            self._statistics = Statistics.of(counts, repeated)
        return self._statistics
