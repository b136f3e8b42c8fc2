"""Long documents in pieces, so that memory does not grow with what is made of a document."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

PIECE = 1 << 18  # characters of a document handled at a time
WINDOW = 1 << 12  # characters, or bytes, before a point in which a better place to cut is sought
LINE_END, WORD_END = re.compile(r"(?<=\S\n)(?=\S)"), re.compile(r"(?<=\S)(?= \S)")


def cut_point(text: str, low: int, high: int) -> int:
    """Where to cut between low and high: after the last line, else before the last word, else (tearing one) at high.

    Between words, byte-level tokenizers (GPT-2's, Llama 3's) give the sides the tokens that they have in the whole: the
    white space there is one character, which they join to nothing, or to the word that follows a space.
    """
    for pattern in (LINE_END, WORD_END):
        if found := [match.start() for match in pattern.finditer(text, max(0, low), high)]:
            return found[-1]
    return high


def pieces(chunks: Iterable[str]) -> Iterator[str]:
    """The text of all chunks in pieces of at most PIECE characters, none empty."""
    rest = ""
    for chunk in chunks:
        rest, start = rest + chunk, 0
        while len(rest) - start > PIECE:
            end = cut_point(rest, start + PIECE - WINDOW, start + PIECE)
            yield rest[start:end]
            start = end
        rest = rest[start:]
    if rest:
        yield rest


def divide(parts: list[bytes], fraction: float) -> tuple[list[bytes], list[bytes]]:
    """A document's pieces of UTF-8 before and after a cut that leaves about `fraction` of its bytes at the end.

    Both sides have text, unless the document is one character, which stays on the first side.
    """
    total = sum(map(len, parts))
    tail = max(1, round(total * fraction))
    start, i = total - tail, 0
    while start >= len(parts[i]):
        start -= len(parts[i])
        i += 1
    text = parts[i].decode()
    at = max(len(parts[i][:start].decode(errors="ignore")), int(i == 0))
    at = cut_point(text, at - min(WINDOW, tail), at)
    left, right = text[:at].encode(), text[at:].encode()
    return [part for part in (*parts[:i], left) if part], [part for part in (right, *parts[i + 1 :]) if part]
