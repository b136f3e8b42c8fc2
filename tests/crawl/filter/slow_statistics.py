# ruff: noqa: RUF001
"""The counts of a text in plain Python, as slow as they are plain: what csrc/crawl/statistics.cpp is compared with."""

from __future__ import annotations

import re
import string
from collections import Counter

from llm.crawl.filter.page import DUPLICATE, TOP, Statistics

ENDS = ".!?\u0589\u061d\u061e\u061f\u06d4\u0964\u0965\u104a\u104b\u1362\u1367\u1368\u17d4\u17d5\u203c\u203d\u2047\u2048"
ENDS += "\u2049。！．？｡"
PUNCTUATION = "«´»–—’“”„…∶━►、。〈〉《》「」【】！％（），．１：；？～" + string.punctuation + ENDS
SYMBOLS = {*PUNCTUATION, *(chr(point) for point in (*range(32), *range(127, 160)) if not chr(point).isspace())}


def repeated(pieces: list[str]) -> tuple[int, int]:
    """How many pieces have come before, and their characters."""
    again = [piece for i, piece in enumerate(pieces) if piece in pieces[:i]]
    return len(again), sum(map(len, again))


def top(words: list[str], n: int) -> int:
    grams = [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
    if not grams:
        return 0
    counts = Counter(grams)
    most = max(counts.values())
    return most * len(next(gram for gram in grams if counts[gram] == most))


def duplicate(words: list[str], n: int) -> int:
    seen, characters, at = set[tuple[str, ...]](), 0, 0
    while at + n <= len(words):
        gram = tuple(words[at : at + n])
        if gram in seen:
            characters += sum(map(len, gram))
            at += n
        else:
            seen.add(gram)
            at += 1
    return characters


def slow_statistics(text: str, words: list[str], stop_words: tuple[str, ...], short_line: int) -> Statistics:
    plain = [word for word in words if set(word) - SYMBOLS]
    lines, full = text.splitlines(), [line for line in text.split("\n") if line.strip()]
    chunks, paragraphs = re.split("\n+", text), re.split("\n{2,}", text.strip())
    return Statistics(
        characters=len(text),
        newlines=text.count("\n"),
        hashes=text.count("#"),
        ellipses=text.count("...") + text.count("…"),
        words=len(words),
        plain_words=len(plain),
        plain_characters=sum(map(len, plain)),
        letter_words=sum(any(map(str.isalpha, word)) for word in words),
        stop_words=len(set(stop_words) & set(words)),
        lines=len(lines),
        bullet_lines=sum(line.lstrip().startswith(("•", "-")) for line in lines),
        ellipsis_lines=sum(line.rstrip().endswith(("...", "…")) for line in lines),
        full_lines=len(full),
        ended_lines=sum(line[-1] in ENDS for line in full),
        short_lines=sum(len(line) <= short_line for line in full),
        repeated_full_characters=repeated(full)[1],
        chunks=len(chunks),
        repeated_chunks=repeated(chunks)[0],
        repeated_chunk_characters=repeated(chunks)[1],
        paragraphs=len(paragraphs),
        repeated_paragraphs=repeated(paragraphs)[0],
        repeated_paragraph_characters=repeated(paragraphs)[1],
        top=tuple(top(words, n) for n in TOP),
        duplicate=tuple(duplicate(words, n) for n in DUPLICATE),
    )
