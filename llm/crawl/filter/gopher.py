"""The rules of Gopher (Rae et al. 2021, arXiv 2112.11446): repetition (table A1) and quality (section A.1.1)."""

from __future__ import annotations

from llm.crawl.filter.page import DUPLICATE, TOP, Page
from llm.crawl.filter.settings import GopherQuality, GopherRepetition


def repetition(page: Page, config: GopherRepetition) -> str:
    """Why a text repeats itself too much; "": it does not."""
    if not page.text:
        return "empty"
    found = page.statistics(ngrams=True)
    if found.repeated_paragraphs / found.paragraphs > config.paragraphs:
        return "paragraphs"
    if found.repeated_paragraph_characters / found.characters > config.paragraph_characters:
        return "paragraph_characters"
    if found.repeated_chunks / found.chunks > config.lines:
        return "lines"
    if found.repeated_chunk_characters / found.characters > config.line_characters:
        return "line_characters"
    for kind, sizes, sums in (("top", TOP, found.top), ("duplicate", DUPLICATE, found.duplicate)):
        for n, characters in zip(sizes, sums, strict=True):
            if characters / found.characters > getattr(config, f"{kind}_{n}_grams"):
                return f"{kind}_{n}_grams"
    return ""


def quality(page: Page, config: GopherQuality) -> str:
    """Why a text does not look like prose; "": it does."""
    found = page.statistics()
    if found.plain_words < max(1, config.min_words):
        return "few_words"
    if found.plain_words > config.max_words:
        return "many_words"
    mean_length = found.plain_characters / found.plain_words
    if mean_length < config.min_word_length:
        return "short_words"
    if mean_length > config.max_word_length:
        return "long_words"
    if found.hashes / found.words > config.hashes:
        return "hashes"
    if found.ellipses / found.words > config.ellipses:
        return "ellipses"
    if found.bullet_lines / found.lines > config.bullet_lines:
        return "bullet_lines"
    if found.ellipsis_lines / found.lines > config.ellipsis_lines:
        return "ellipsis_lines"
    if found.letter_words / found.words < config.letter_words:
        return "letter_words"
    return "stop_words" if found.stop_words < config.min_stop_words else ""
