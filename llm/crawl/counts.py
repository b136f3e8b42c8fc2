"""What a task reports beside its documents: what it removed and why, what was damaged, and histograms."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from llm.crawl.documents import Document

SAMPLES, CHARACTERS = 3, 300  # texts kept of each reason for removal, and how much of each
DAMAGES = 100  # places that are listed; all are counted


@dataclass
class Counts:
    """Filled by a stage while it goes through one task. All of it depends on the input and the settings alone."""

    documents_in: int = 0
    documents_out: int = 0
    bytes_in: int = 0
    """Of the file in the first stage, of UTF-8 text in the others."""
    bytes_out: int = 0
    removed: Counter[str] = field(default_factory=Counter[str])
    """Documents by reason, such as `gopher.mean_word_length`."""
    samples: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    """The beginnings of the first that were removed for a reason."""
    damage_count: int = 0
    damage: list[dict[str, str | int]] = field(default_factory=list[dict[str, str | int]])
    """source, offset, what: the first DAMAGES of them."""
    histograms: dict[str, Counter[str]] = field(default_factory=dict[str, Counter[str]])

    def remove(self, reason: str, document: Document) -> None:
        """Count a document that does not go on to the next stage."""
        self.removed[reason] += 1
        kept = self.samples.setdefault(reason, [])
        if len(kept) < SAMPLES:
            kept.append(document.text[:CHARACTERS])

    def damaged(self, source: str, offset: int, what: str) -> None:
        """Count something that cannot be read."""
        self.damage_count += 1
        if len(self.damage) < DAMAGES:
            self.damage.append({"source": source, "offset": offset, "what": what})

    def count(self, histogram: str, key: str, number: int = 1) -> None:
        self.histograms.setdefault(histogram, Counter())[key] += number
