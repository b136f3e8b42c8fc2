"""The tokens that every loader reads: Megatron's pairs of files, whose .bin is also nanoGPT's form."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

VOCABULARIES = {"uint16": 50257, "uint32": 128256}  # GPT-2's and Llama 3's
MEGATRON_CODES = {"uint16": 8, "uint32": 4}  # its four-byte type is int32: the same bytes, as ids lie below 2^31
MEAN_LENGTH, SIGMA = 906, 1.2  # documents' lengths in tokens, lognormal: close to web text
BLOCK = 1 << 24  # tokens written at a time
DISTINCT_FROM = {"uint16": 1, "uint32": 100_000}  # beyond what two bytes hold


@dataclass(frozen=True)
class TokenSet:
    """Token files under `folder`: 000000.bin, 000000.idx and so on, all of one size (the last has the rest)."""

    folder: Path
    item: str
    """uint16 or uint32."""
    tokens: int
    shards: int = 1
    kind: str = "random"
    """Of its ids. random: uniform. distinct: each tells its place, ends of documents apart. sparse: a hole, all 0."""

    @property
    def item_size(self) -> int:
        return np.dtype(self.item).itemsize

    @property
    def vocab_size(self) -> int:
        return DISTINCT_FROM[self.item] + self.tokens if self.kind == "distinct" else VOCABULARIES[self.item]

    @property
    def eod_id(self) -> int:
        return 0 if self.kind == "distinct" else self.vocab_size - 1

    def path(self, shard: int) -> Path:
        return self.folder / f"{shard:06d}.bin"

    @property
    def paths(self) -> list[Path]:
        return [self.path(shard) for shard in range(self.shards)]

    @property
    def sizes(self) -> list[int]:
        """Tokens of each file."""
        size = self.tokens // self.shards
        return [size] * (self.shards - 1) + [self.tokens - size * (self.shards - 1)]

    def read(self, shard: int) -> NDArray:
        """The ids of a file, mapped."""
        return np.memmap(self.path(shard), np.dtype(self.item).newbyteorder("<"), "r")

    def make(self) -> None:
        """Write the files, unless they are there whole."""
        done = self.folder / "made"
        if done.exists():
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        rng = np.random.default_rng(0)
        first = 0
        for path, size in zip(self.paths, self.sizes, strict=True):
            with path.open("wb") as file:
                if self.kind == "sparse":
                    file.truncate(size * self.item_size)
                    continue
                lengths = _lengths(rng, size)
                for block in self._blocks(rng, lengths, first):
                    block.tofile(file)
            _write_index(path.with_suffix(".idx"), lengths, MEGATRON_CODES[self.item], self.item_size)
            first += size
        done.touch()

    def _blocks(self, rng: np.random.Generator, lengths: NDArray[np.int64], first: int) -> Iterator[NDArray]:
        """The ids of a file whose documents have these lengths; the ids of the file begin at place `first`."""
        ends = np.cumsum(lengths)
        for start in range(0, int(ends[-1]), BLOCK):
            stop = min(start + BLOCK, int(ends[-1]))
            if self.kind == "distinct":
                ids = np.arange(first + start, first + stop) + DISTINCT_FROM[self.item]
                ids = ids.astype(self.item)
            else:
                ids = rng.integers(0, self.vocab_size - 1, stop - start, dtype=self.item)
            here = ends[np.searchsorted(ends, start, "right") : np.searchsorted(ends, stop, "right")]
            ids[here - 1 - start] = self.eod_id
            yield ids


def _lengths(rng: np.random.Generator, size: int) -> NDArray[np.int64]:
    """Tokens of each document of a file, its last cut so that they fill the file."""
    mu = np.log(MEAN_LENGTH) - SIGMA**2 / 2
    lengths = np.empty(0, np.int64)
    while lengths.sum() < size:
        more = rng.lognormal(mu, SIGMA, size // MEAN_LENGTH + 10).astype(np.int64)
        lengths = np.concatenate([lengths, np.maximum(more, 2)])
    ends = np.cumsum(lengths)
    lengths = lengths[: int(np.searchsorted(ends, size)) + 1]
    lengths[-1] -= lengths.sum() - size
    return lengths


def _write_index(path: Path, lengths: NDArray[np.int64], code: int, item_size: int) -> None:
    """Megatron's index, version 1: a sequence per document."""
    with path.open("wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, code, lengths.size, lengths.size + 1))
        lengths.astype("<i4").tofile(file)
        ((np.cumsum(lengths) - lengths) * item_size).astype("<i8").tofile(file)
        np.arange(lengths.size + 1, dtype="<i8").tofile(file)
