"""Signatures and clusters computed slowly: what the tests compare with."""

from __future__ import annotations

from collections.abc import Sequence

from llm.crawl._native import words

WORD = (1 << 64) - 1
SPACELESS = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x2E80, 0xA4CF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))


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
    found = [""]
    for word in words(text):
        if not any(sign.isalpha() or sign in "0123456789" for sign in word):
            continue
        for sign in word:
            if any(first <= ord(sign) <= last for first, last in SPACELESS):
                found += [sign, ""]
            else:
                found[-1] += sign
        found.append("")
    return [word for word in found if word] or [text]


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
    """The smallest document of each one's cluster: whoever shares a hash takes the smaller label, until none changes."""
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
