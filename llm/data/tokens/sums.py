"""Checksums of the blocks of token files, by which a flipped bit is found when its block is first read.

A file is cut from its first byte into blocks of 64 KiB and a last one of what is left. `<split>.sums` holds the XXH64
of each block of each file of the split, in order, as little-endian uint64. csrc/core/sums.h is the twin of BlockSums.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from llm.data.tokens.headers import File
from llm.errors import DamagedFile, InputError, require
from llm.files import complete_file, sha256_of

BLOCK = 1 << 16  # bytes
ADVICE = "restore the file from its source, or run python launch/prepare_data.py again with another data.path"


class SumsFile(NamedTuple):
    """The checksums of a corpus, as its manifest lists them."""

    path: str
    sha256: str

    def checked(self) -> str:
        """The path, once all of the file was compared with the manifest; InputError where it is damaged."""
        try:
            found = sha256_of(self.path)
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {error}") from error
        advice = "the file of checksums is damaged; restore it, or set data.verify=none to train without it"
        require(found == self.sha256, f"{self.path}: sha256 {found}, the manifest says {self.sha256}: {advice}")
        return self.path


def sums_name(split: str) -> str:
    """The name of the checksums of a split, in its folder and in `Manifest.files`."""
    return f"{split}.sums"


def block_sums(data: bytes) -> bytes:
    """The checksums of bytes that begin with a block."""
    starts = range(0, len(data), BLOCK)
    return b"".join(xxhash.xxh64_intdigest(data[at : at + BLOCK]).to_bytes(8, "little") for at in starts)


def write_sums(path: Path, parts: Iterable[bytes]) -> None:
    """Write the checksums that `block_sums` gave of each part of the token files, completely or not at all."""
    with complete_file(path) as file:
        file.writelines(parts)


def sums_of(path: Path) -> Iterable[bytes]:
    """The checksums of a token file, read in parts."""
    with path.open("rb") as file:
        while chunk := file.read(16 * BLOCK):
            yield block_sums(chunk)


class BlockSums:
    """Which blocks of a corpus were found to have their checksums."""

    def __init__(self, sums: SumsFile, sizes: Sequence[int]) -> None:
        """sizes: bytes of each token file. InputError as SumsFile.checked()."""
        self._path = sums.checked()
        *self._first, total = accumulate((-(-size // BLOCK) for size in sizes), initial=0)
        self._verified = np.zeros(total, bool)

    def verify(self, shard: int, path: str, data: NDArray[np.uint8], begin: int, end: int) -> None:
        """Read the blocks that bytes [begin, end) of a file lie in, but for those that were found good.

        data: all bytes of the file, which is the shard-th. DamagedFile names the first that has another checksum.
        """
        for block in range(begin // BLOCK, -(-end // BLOCK)):
            at, i = block * BLOCK, self._first[shard] + block
            if self._verified[i]:
                continue
            with File(self._path) as file:
                expected = file.number(8 * i, "Q")
            content = data[at : at + BLOCK]
            found = xxhash.xxh64_intdigest(content.tobytes())
            if found != expected:
                raise DamagedFile(
                    f"{path}: the {content.size} bytes from byte {at} on have the xxh64 {found:x}, "
                    f"expected {expected:x} ({self._path}): {ADVICE}"
                )
            self._verified[i] = True
