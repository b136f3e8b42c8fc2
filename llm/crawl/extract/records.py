"""What the readers give: one page or text of a file, still as its bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

Damaged: TypeAlias = Callable[[int, str], None]
"""Is told the place in a file of what cannot be read, and what is wrong with it."""


@dataclass(slots=True)
class Record:
    """A page or a text."""

    offset: int
    """In bytes in WARC files (in compressed ones: of the member that it begins in), else its line or row, from 1."""
    body: bytes | str
    is_html: bool
    url: str = ""
    date: str = ""
    charset: str = ""
    """As the server declared it."""
    left_out: str = ""
    """Why it is nothing for a corpus: its HTTP status or MIME type."""
    end: int = 0
    """Bytes of a WARC file that have been read so far."""
