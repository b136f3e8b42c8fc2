"""Megatron's token files: `<name>.bin` holds the ids, `<name>.idx` where each document lies.

The .idx file, little-endian: magic (9 bytes), version u64 = 1, dtype code u8 (8: uint16, 4: int32),
sequence count S u64, document boundary count u64 = documents + 1, then the sequence lengths
int32[S] in tokens, their byte offsets int64[S] in the .bin file, and the document boundaries int64
in sequences. Here one sequence is one document, ended by the end-of-document token.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from llm.errors import InputError, require

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
CODES = {"uint16": 8, "int32": 4}  # Megatron's dtype codes
CHUNK = 1 << 18  # entries of an index handled at a time, so that memory does not grow with it


def token_dtype(vocab_size: int) -> str:
    """The narrowest dtype that holds ids below `vocab_size`."""
    return "uint16" if vocab_size <= 2**16 else "int32"


class TokenWriter:
    """Writes one pair of files in constant memory; they appear under their names only when whole.

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

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
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
    tokens: int
    documents: int


def read_index(prefix: Path) -> TokenIndex:
    """Open and check `<prefix>.idx`, and the size of `<prefix>.bin` against it.

    Raises InputError when a file is unreadable, truncated, of another format or inconsistent.
    """
    path = prefix.with_name(prefix.name + ".idx")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(HEADER.size)
        bin_size = prefix.with_name(prefix.name + ".bin").stat().st_size
    except OSError as error:
        raise InputError(f"token files {prefix}.bin and .idx cannot be read: {error}") from error
    require(len(header) == HEADER.size, f"{path}: has {size} bytes, less than a header; it is truncated")
    magic, version, code, sequences, boundaries = HEADER.unpack(header)
    require(magic == MAGIC, f"{path}: begins with {magic!r}; expected Megatron's {MAGIC!r}")
    require(version == VERSION, f"{path}: version {version}; expected {VERSION}")
    dtype = next((name for name, known in CODES.items() if known == code), None)
    if dtype is None:
        raise InputError(f"{path}: dtype code {code}; expected 8 (uint16) or 4 (int32)")
    expected = HEADER.size + 12 * sequences + 8 * boundaries
    require(
        size == expected,
        f"{path}: has {size} bytes, its header says {expected}; it is truncated or damaged",
    )
    require(sequences >= 1 and boundaries >= 2, f"{path}: holds no document")
    lengths = np.memmap(path, "<i4", "r", HEADER.size, (sequences,))
    offsets = np.memmap(path, "<i8", "r", HEADER.size + 4 * sequences, (sequences,))
    bounds = np.memmap(path, "<i8", "r", HEADER.size + 12 * sequences, (boundaries,))
    tokens = _check_sequences(path, lengths, offsets, np.dtype(dtype).itemsize)
    _check_bounds(path, bounds, sequences)
    expected = tokens * np.dtype(dtype).itemsize
    require(
        bin_size == expected,
        f"{prefix}.bin: has {bin_size} bytes, its index says {expected}; it is damaged",
    )
    return TokenIndex(dtype, lengths, tokens, boundaries - 1)


def _check_sequences(path: Path, lengths: NDArray, offsets: NDArray, item_size: int) -> int:
    """The sum of the lengths, after checking that sequences follow one another without gaps."""
    tokens = 0
    for start in range(0, lengths.size, CHUNK):
        part = lengths[start : start + CHUNK].astype(np.int64)
        require(int(part.min()) >= 1, f"{path}: a sequence near number {start} has no tokens")
        ends = tokens + part.cumsum()
        found = offsets[start : start + CHUNK]
        require(
            bool(np.array_equal(found, (ends - part) * item_size)),
            f"{path}: the offsets from sequence {start} on do not fit the lengths; it is damaged",
        )
        tokens = int(ends[-1])
    return tokens


def _check_bounds(path: Path, bounds: NDArray, sequences: int) -> None:
    rising = all(
        bool((np.diff(bounds[start : start + CHUNK + 1]) >= 0).all()) for start in range(0, bounds.size, CHUNK)
    )
    require(
        bounds[0] == 0 and bounds[-1] == sequences and rising,
        f"{path}: the document boundaries do not rise from 0 to {sequences}; it is damaged",
    )


class NumpyTokenStore:
    """The NumPy twin of `_native.TokenStore`: a mapped .bin file whose reads are checked."""

    def __init__(self, path: str, dtype: str, n_tokens: int) -> None:
        self.tokens: NDArray = np.memmap(path, np.dtype(dtype).newbyteorder("<"), "r", shape=(n_tokens,))

    def __len__(self) -> int:
        return self.tokens.size

    def read_rows(self, starts: NDArray[np.int64], width: int) -> NDArray:
        """Tokens [len(starts), width], row i from position starts[i] on; IndexError outside."""
        if starts.size and not (starts.min() >= 0 and starts.max() <= len(self) - width):
            raise IndexError(f"rows of {width} tokens lie outside the {len(self)} tokens of the file")
        out = np.empty((starts.size, width), self.tokens.dtype)
        for row, start in zip(out, starts, strict=True):
            row[:] = self.tokens[start : start + width]
        return out
