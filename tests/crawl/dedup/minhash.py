"""Signatures and clusters computed slowly: what the tests compare with."""

from __future__ import annotations

import re
from collections.abc import Sequence

from llm.crawl._native import words

WORD = (1 << 64) - 1
DIGITS = frozenset("0123456789")
SPACELESS = r"([\u0E00-\u0EFF\u1000-\u109F\u1780-\u17FF\u2E80-\u2FDF\u3041-\uA4CF\uF900-\uFAFF\U00020000-\U0003FFFF])"


def mixed(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & WORD
    return x ^ x >> 31


def hash_of(content: bytes) -> int:
    hashed = len(content)
    for i in range(0, len(content), 8):
        hashed = mixed(hashed ^ int.from_bytes(content[i : i + 8], "little"))
    return hashed


def words_of(text: str) -> list[str]:
    pieces = [piece for word in words(text) for piece in re.split(SPACELESS, word)]
    found = [piece for piece in pieces if re.match(SPACELESS, piece) or any(c.isalpha() or c in DIGITS for c in piece)]
    return found or [text]


def shingles_of(text: str, size: int) -> list[int]:
    hashes = [hash_of(word.encode()) for word in words_of(text)]
    size = min(size, len(hashes))
    shingles = list[int]()
    for i in range(len(hashes) - size + 1):
        total = 0
        for hashed in hashes[i : i + size]:
            total = total * 0x9E3779B97F4A7C15 + hashed & WORD
        shingles.append(mixed(total))
    return shingles


def signature(text: str, size: int, bands: int, rows: int) -> list[int]:
    shingles = shingles_of(text, size)
    minima = list[int]()
    for i in range(bands * rows):
        random = mixed(i + 1)
        factor, term = random & 0xFFFFFFFF | 1, random >> 32
        minima.append(min((shingle >> 32) * factor + term & 0xFFFFFFFF for shingle in shingles))
    everything = 0
    for word in words_of(text):
        everything = mixed(everything ^ hash_of(word.encode()))
    found = [mixed(min(shingle & 0xFFFFFFFF for shingle in shingles) + 1), everything]
    for band in range(bands):
        hashed = 0
        for row in range(rows):
            hashed = mixed(hashed ^ minima[band * rows + row] + 1)
        found.append(hashed)
    return found


def clusters(signatures: Sequence[Sequence[int]]) -> list[int]:
    """The smallest document of each one's cluster: who shares a hash takes the smaller label, until none changes."""
    labels = list(range(len(signatures)))
    changed = True
    while changed:
        changed = False
        for column in range(1, len(signatures[0]) if signatures else 0):
            least = dict[int, int]()
            for label, signed in zip(labels, signatures, strict=True):
                least[signed[column]] = min(label, least.get(signed[column], label))
            for i, signed in enumerate(signatures):
                if least[signed[column]] < labels[i]:
                    labels[i], changed = least[signed[column]], True
    return labels
