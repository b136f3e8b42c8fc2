"""The section `filter` of a corpus's config: each rule with its published thresholds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FilterConfig:
    """Which documents stay."""

    rules: tuple[str, ...] = ("url", "language", "gopher_repetition", "gopher_quality", "c4", "fineweb")
    """The rules, in the order in which they are asked; the first that refuses a document counts."""
    languages: tuple[str, ...] = ("en",)
    """ISO 639 codes of the languages that stay; none: all."""
