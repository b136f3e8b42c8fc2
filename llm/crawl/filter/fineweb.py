"""The rules that FineWeb added (Penedo et al. 2024, arXiv 2406.17557, section 3.6)."""

from __future__ import annotations

from llm.crawl.filter.page import Page
from llm.crawl.filter.settings import FineWebRule


def lists(page: Page, config: FineWebRule) -> str:
    """Why a text looks like lists and boilerplate rather than prose; "": it does not."""
    found = page.statistics()
    if not found.full_lines:
        return "empty"
    if found.ended_lines / found.full_lines < config.ended_lines:
        return "ended_lines"
    if found.short_lines / found.full_lines > config.short_lines:
        return "short_lines"
    if found.repeated_full_characters / (found.characters - found.newlines) > config.repeated_characters:
        return "repeated_characters"
    return "newlines" if found.newlines / found.words > config.newlines else ""
