"""Megatron's token files: `<name>.bin` holds the ids, `<name>.idx` says where each document lies.

The .idx file, little-endian: magic (9 bytes), version u64 = 1, dtype code u8 (1: uint8, 8: uint16, 4: int32),
sequence count S u64, document boundary count u64 = documents + 1, then the sequence lengths
int32[S] in tokens, their byte offsets int64[S] in the .bin file, and the document boundaries int64
in sequences. Ingot writes one sequence per document, ended by the end-of-document token.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llm.data.tokens.headers import CODES, HEADER, MAGIC, VERSION, check_header, describe_megatron, index_path
from llm.errors import DamagedFile, InputError

CHUNK = 1 << 18  # entries of an index handled at a time, so that memory does not grow with it


def token_dtype(vocab_size: int) -> str:
    """The narrowest dtype that holds ids below `vocab_size`."""
    return "uint16" if vocab_size <= 2**16 else "int32"


class TokenWriter:
    """Writes one pair of files in constant memory; they appear under their names only when complete.

    Use as a context manager: leaving it normally completes the files, an exception removes them.
    """

    def __init__(self, prefix: Path, dtype: str) -> None:
        self.prefix, self.dtype = prefix, np.dtype(dtype).newbyteorder("<")
        self.code = CODES[dtype]
        self.tokens = self.documents = 0
        self._temporary = {kind: prefix.with_name(f"{prefix.name}.{kind}.tmp") for kind in ("bin", "idx", "lengths")}
        self._bin = self._temporary["bin"].open("wb")
        self._lengths = self._temporary["lengths"].open("wb")

    def add(self, tokens: NDArray[np.integer]) -> None:
        """Append one document: ids [n], the end-of-document token included."""
        limits = np.iinfo(self.dtype)
        if not 1 <= tokens.size <= np.iinfo(np.int32).max:
            raise InputError(f"a document has {tokens.size} tokens; expected between 1 and 2^31 - 1")
        if tokens.min() < 0 or tokens.max() > limits.max:
            raise ValueError(f"token ids {tokens.min()}..{tokens.max()} do not fit {self.dtype}")
        self._bin.write(tokens.astype(self.dtype).tobytes())
        self._lengths.write(struct.pack("<i", tokens.size))
        self.tokens += int(tokens.size)
        self.documents += 1

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._lengths.close()
            if kind is None:
                _sync(self._bin)
                self._write_index()
                for suffix in ("bin", "idx"):
                    self._temporary[suffix].replace(self.prefix.with_name(f"{self.prefix.name}.{suffix}"))
        finally:
            self._bin.close()
            for path in self._temporary.values():
                path.unlink(missing_ok=True)

    def _write_index(self) -> None:
        lengths = np.empty(0, "<i4")
        if self.documents:
            lengths = np.memmap(self._temporary["lengths"], "<i4", "r", shape=(self.documents,))
        with self._temporary["idx"].open("wb") as file:
            file.write(HEADER.pack(MAGIC, VERSION, self.code, self.documents, self.documents + 1))
            for start in range(0, self.documents, CHUNK):
                file.write(lengths[start : start + CHUNK].tobytes())
            offset = 0
            for start in range(0, self.documents, CHUNK):
                ends = lengths[start : start + CHUNK].cumsum(dtype=np.int64) * self.dtype.itemsize
                begins = np.concatenate(([0], ends[:-1])) + offset
                file.write(begins.astype("<i8").tobytes())
                offset += int(ends[-1])
            for start in range(0, self.documents + 1, CHUNK):
                stop = min(start + CHUNK, self.documents + 1)
                file.write(np.arange(start, stop, dtype="<i8").tobytes())
            _sync(file)


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


@dataclass(frozen=True)
class TokenIndex:
    """What a validated .idx file says."""

    dtype: str
    lengths: NDArray[np.int32]
    """Tokens of each sequence [S]."""
    offsets: NDArray[np.int64]
    """The byte of the .bin file at which each sequence begins [S]."""
    bounds: NDArray[np.int64]
    """Sequences before each document, and all of them [documents + 1]."""
    tokens: int

    @property
    def documents(self) -> int:
        return self.bounds.size - 1


def read_index(prefix: Path) -> TokenIndex:
    """Open `<prefix>.idx` and check all of it, and the size of `<prefix>.bin` against it.

    Raises DamagedFile when a file is unreadable, truncated, of another format or inconsistent.
    """
    name = f"{prefix}.bin"
    path = index_path(name, "megatron")
    assert path is not None
    header = describe_megatron(name)
    check_header(name, "megatron", header.dtype, header.tokens)
    sequences, boundaries = (int(n) for n in np.memmap(path, "<i8", "r", 18, (2,)))
    lengths = np.memmap(path, "<i4", "r", HEADER.size, (sequences,))
    offsets = np.memmap(path, "<i8", "r", HEADER.size + 4 * sequences, (sequences,))
    bounds = np.memmap(path, "<i8", "r", HEADER.size + 12 * sequences, (boundaries,))
    _check_sequences(path, lengths, offsets, np.dtype(header.dtype).itemsize)
    check_rising(path, bounds, HEADER.size + 12 * sequences)
    return TokenIndex(header.dtype, lengths, offsets, bounds, header.tokens)


def _check_sequences(path: str, lengths: NDArray, offsets: NDArray, item_size: int) -> None:
    """Sequences must follow one another without a gap or an overlap."""
    tokens = 0
    for start in range(0, lengths.size, CHUNK):
        part = lengths[start : start + CHUNK].astype(np.int64)
        if (empty := np.flatnonzero(part < 1)).size:
            at = start + int(empty[0])
            raise DamagedFile(f"{path}: sequence {at}, at byte {HEADER.size + 4 * at}, has {part[empty[0]]} tokens")
        ends = tokens + part.cumsum()
        expected = (ends - part) * item_size
        found = offsets[start : start + CHUNK]
        if (wrong := np.flatnonzero(found != expected)).size:
            at = start + int(wrong[0])
            raise DamagedFile(
                f"{path}: the offset of sequence {at}, at byte {HEADER.size + 4 * lengths.size + 8 * at}, is "
                f"{found[wrong[0]]}, expected {expected[wrong[0]]}: the sequences overlap or leave gaps"
            )
        tokens = int(ends[-1])


def check_rising(path: str, numbers: NDArray, offset: int) -> None:
    """Numbers of an index file, from byte `offset` on, must not fall; DamagedFile names the byte where they do."""
    for start in range(0, numbers.size, CHUNK):
        part = numbers[start : start + CHUNK + 1]
        if (falling := np.flatnonzero(part[1:] < part[:-1])).size:
            at = start + int(falling[0]) + 1
            raise DamagedFile(
                f"{path}: the document boundary at byte {offset + 8 * at} is {numbers[at]}, "
                f"expected at least {numbers[at - 1]}, the one before it"
            )
