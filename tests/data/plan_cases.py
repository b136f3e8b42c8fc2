"""Documents of given lengths, as token files and as ranges, and the twin that plans of them are compared with."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llm.data.tokens.shards import ShardList

EOD = 7


def corpus_of(folder: Path, lengths: list[int], eod_first: bool = False, files: int = 2) -> ShardList:
    """Documents of these lengths, without regard to the edges of the files that they lie in."""
    tokens = np.full(sum(lengths), 1, "uint16")
    ends = np.cumsum(lengths)
    tokens[ends - lengths if eod_first else ends - 1] = EOD
    return shards_of(folder, tokens, eod_first, files)


def shards_of(folder: Path, tokens: NDArray, eod_first: bool, files: int) -> ShardList:
    parts = [part for part in np.array_split(tokens, files) if part.size]
    paths = [folder / f"{i}.bin" for i in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        part.tofile(path)
    sizes = tuple(part.size for part in parts)
    return ShardList("test", "raw", "uint16", tuple(map(str, paths)), sizes, 100, EOD, eod_first)


def documents_of(lengths: list[int], first: int = 0) -> NDArray[np.int64]:
    return np.stack([first + np.cumsum(lengths) - lengths, lengths], axis=1).astype(np.int64)


def targets(pieces: NDArray[np.int64]) -> Counter[int]:
    """How often each token is a target: all of a piece but its first."""
    return Counter(token for start, n in pieces.tolist() for token in range(start + 1, start + n))


def plan_window(documents: NDArray[np.int64], seq_len: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pieces [P, 2] of the documents [n, 2], row by row, and the pieces up to the end of each row [R].

    Best-fit decreasing: pieces from the longest to the shortest, equal ones in their order, each into
    the row with the least free space that suffices, among equals the one changed last; else into a
    new row. The twin of `_native.plan_window`.
    """
    cut = []
    for start, tokens in documents.tolist():
        full = (tokens - 1) // seq_len
        cut += [(start + i * seq_len, seq_len + 1) for i in range(full)]
        if tokens - full * seq_len > 1 or full == 0:
            cut.append((start + full * seq_len, tokens - full * seq_len))
    rows: list[list[tuple[int, int]]] = []
    free: list[tuple[int, int, int]] = []  # (free space, -time of the last change, row), sorted
    for time, piece in enumerate(sorted(cut, key=lambda piece: -piece[1])):
        best = bisect_left(free, (piece[1],))
        space, row = seq_len + 1, len(rows)
        if best < len(free):
            space, _, row = free.pop(best)
        else:
            rows.append([])
        rows[row].append(piece)
        insort(free, (space - piece[1], -time, row))
    pieces = np.array([piece for row in rows for piece in row], np.int64).reshape(-1, 2)
    return pieces, np.cumsum([len(row) for row in rows], dtype=np.int64)
