"""Writes the tokens that every loader reads: Megatron's pairs of files, whose .bin is also nanoGPT's format."""

import os
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

VOCABULARIES = {"uint16": 50257, "uint32": 128256}  # GPT-2's and Llama 3's
MEGATRON_CODES = {"uint16": 8, "uint32": 4}  # its four-byte type is int32: the same bytes, as ids lie below 2^31
MEAN_LENGTH, SIGMA = 906, 1.2  # documents' lengths in tokens, lognormal: close to web text
DISTINCT_FROM = {"uint16": 1, "uint32": 100_000}  # beyond what two bytes hold


@dataclass(frozen=True)
class TokenSet:
    """Token files under `folder`: 000000.bin, 000000.idx and so on, all of one size (the last has the rest).

    item: uint16 or uint32. kind: of its ids. random: uniform. distinct: each tells its place, ends of documents apart.
    sparse: a hole, all 0.
    """

    folder: Path
    item: str
    tokens: int
    shards: int = 1
    kind: str = "random"

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
        if finished(self.folder):
            return
        self.folder.mkdir(parents=True)
        rng = np.random.default_rng(0)
        first = 0
        for path, size in zip(self.paths, self.sizes, strict=True):
            if self.kind == "sparse":
                path.touch()
                os.truncate(path, size * self.item_size)
                continue
            lengths = _lengths(rng, size)
            self._ids(rng, lengths, first).tofile(path)
            _write_index(path.with_suffix(".idx"), lengths, MEGATRON_CODES[self.item], self.item_size)
            first += size
        (self.folder / "made").touch()

    def _ids(self, rng: np.random.Generator, lengths: NDArray[np.int64], first: int) -> NDArray:
        """The ids of a file whose documents have these lengths; the ids of the file begin at place `first`."""
        ends = np.cumsum(lengths)
        if self.kind == "distinct":
            ids = (np.arange(first, first + ends[-1]) + DISTINCT_FROM[self.item]).astype(self.item)
        else:
            ids = rng.integers(0, self.vocab_size - 1, ends[-1], dtype=self.item)
        ids[ends - 1] = self.eod_id
        return ids


def finished(folder: Path) -> bool:
    """Whether what is made in `folder` is complete; what an interrupted run left is removed."""
    if not (folder / "made").exists():
        shutil.rmtree(folder, ignore_errors=True)
        return False
    return True


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
