"""The section `dedup` of a corpus's config."""

from __future__ import annotations

from dataclasses import dataclass

from llm.config.sections import check_at_least


@dataclass(frozen=True)
class DedupConfig:
    """Which documents count as duplicates."""

    shingle_words: int = 5
    """Words of a shingle; documents are compared by their sets of shingles."""
    bands: int = 14
    """Two documents are alike if all hashes of one band are equal."""
    rows: int = 8
    """MinHashes of a band."""
    memory_mb: int = 512
    """That the merge of the bands may take beside 17 bytes of each document; more goes through files."""
    sample: int = 2_000
    """Documents, at most, that are compared exactly to measure recall, and again precision; 0: none."""

    def __post_init__(self) -> None:
        check_at_least(1, "dedup.", self, "shingle_words", "bands", "rows", "memory_mb")
        check_at_least(0, "dedup.", self, "sample")
