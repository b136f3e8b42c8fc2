"""Cuts long texts where tokenizers cut them anyway: before a space that follows something else.

A trainer's time grows with the square of a word's length, the library's memory with that of a text: neither is bounded.
"""

from __future__ import annotations

import re
import unicodedata

LONGEST_PIECE = 16_384  # characters that are encoded at once
LONGEST_WORD = 1_000  # characters of a word that the trainer sees

_BEFORE_SPACE = re.compile(r".+\S(?= )", re.DOTALL)
_MARKS = r"[\n.,;:!?\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f]"
_BEFORE_MARK = re.compile(rf".+\w(?={_MARKS})", re.DOTALL)  # in scripts that write no spaces


def pieces(text: str, limit: int) -> tuple[list[str], int]:
    """The text in pieces of at most `limit` characters, and how many of the cuts had no space to be made at.

    Only those can change the tokens, and only beside the cut.
    """
    found, forced, start = [], 0, 0
    while len(text) - start > limit:
        stop = start + limit
        at_space = _BEFORE_SPACE.match(text, start, stop + 1)
        forced += at_space is None
        if cut := at_space or _BEFORE_MARK.match(text, start, stop + 1):
            stop = cut.end()
        else:  # no further back than 32 characters, so that a letter keeps its marks
            whole = (i for i in range(stop, stop - 32, -1) if unicodedata.category(text[i])[0] != "M")
            stop = next(whole, stop)
        found.append(text[start:stop])
        start = stop
    return [*found, text[start:]], forced
