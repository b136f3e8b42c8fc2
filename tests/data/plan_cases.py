"""Documents of given lengths, as token files and as ranges, for tests of packing plans."""

from __future__ import annotations

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
