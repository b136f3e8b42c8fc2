"""Megatron's token files: `<name>.bin` holds the ids, `<name>.idx` says where each document lies.

The .idx file, little-endian: magic (9 bytes), version u64 = 1, dtype code u8 (1: uint8, 8: uint16, 4: int32),
sequence count S u64, document boundary count u64 = documents + 1, then the sequence lengths
int32[S] in tokens, their byte offsets int64[S] in the .bin file, and the document boundaries int64
in sequences. Ingot writes one sequence per document, ended by the end-of-document token.
"""

from __future__ import annotations

import shutil
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from llm.data.tokens.headers import CODES, HEADER, MAGIC, VERSION, check_header, describe_megatron
from llm.errors import DamagedFile, InputError
from llm.files import complete_file

CHUNK = 1 << 18  # entries of an index handled at a time, so that memory does not grow with it


def token_dtype(vocab_size: int) -> str:
    """The narrowest dtype that holds ids below `vocab_size`."""
    return "uint16" if vocab_size <= 2**16 else "int32"


class TokenWriter:
    """Writes one pair of files in constant memory."""

    def __init__(self, ids: BinaryIO, lengths: BinaryIO, dtype: str) -> None:
        """ids: the .bin file. lengths: a file for the tokens of each document, read again for the index."""
        self._ids, self._lengths, self._code = ids, lengths, CODES[dtype]
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.tokens = self.documents = self._open = 0

    @classmethod
    @contextmanager
    def open(cls, prefix: Path, dtype: str) -> Iterator[TokenWriter]:
        """The writer of `<prefix>.bin` and `<prefix>.idx`, which appear when the block ends without an exception."""
        bin_path, idx_path = (prefix.with_name(f"{prefix.name}.{suffix}") for suffix in ("bin", "idx"))
        with (
            complete_file(idx_path) as index,
            complete_file(bin_path) as ids,
            tempfile.TemporaryFile(dir=prefix.parent) as lengths,
        ):
            writer = cls(ids, lengths, dtype)
            yield writer
            writer._write_index(index)

    def add(self, tokens: NDArray[np.integer], ends: bool = True) -> None:
        """Append ids [n] to the open document. ends: it ends with them, the last being the end-of-document token."""
        self._check(tokens)
        self._open += int(tokens.size)
        if self._open > np.iinfo(np.int32).max or (ends and not self._open):
            raise InputError(f"a document has {self._open} tokens; expected between 1 and 2^31 - 1")
        self._ids.write(np.ascontiguousarray(tokens, self.dtype).data)
        self.tokens += int(tokens.size)
        if ends:
            self._lengths.write(struct.pack("<i", self._open))
            self._open, self.documents = 0, self.documents + 1

    def add_documents(self, documents: Sequence[NDArray[np.integer]], end: int) -> None:
        """Append documents, and the end-of-document token `end` to each: as add() of each, but faster."""
        if documents:
            ending = np.array([end], documents[0].dtype)
            for document in (*documents, ending):
                self._check(document)
            # In the type that is written: a wider copy of all costs as much as the rest of this.
            parts = [part for document in documents for part in (document, ending)]
            ids = np.concatenate(parts, dtype=self.dtype, casting="unsafe")
            self._ids.write(ids.data)
            self.tokens += ids.size
            self._lengths.write(np.array([document.size + 1 for document in documents], "<i4").tobytes())
            self._open, self.documents = 0, self.documents + len(documents)

    def _check(self, tokens: NDArray[np.integer]) -> None:
        """Raise ValueError where an id does not fit the dtype."""
        too_small = tokens.size and tokens.dtype.kind != "u" and tokens.min() < 0
        if too_small or (tokens.size and tokens.max() > np.iinfo(self.dtype).max):
            raise ValueError(f"token ids {tokens.min()}..{tokens.max()} do not fit {self.dtype}")

    def append(self, prefix: Path) -> None:
        """Append the documents of another pair of files. DamagedFile where it is not whole, or of another dtype."""
        index = read_index(prefix)
        if index.dtype != self.dtype.name:
            raise DamagedFile(f"{prefix}.bin: ids of {index.dtype}, expected {self.dtype.name}")
        with open(f"{prefix}.bin", "rb") as ids:
            shutil.copyfileobj(ids, self._ids, 1 << 20)
        self._lengths.write(index.lengths.tobytes())
        self.tokens, self.documents = self.tokens + index.tokens, self.documents + index.lengths.size

    def _write_index(self, file: BinaryIO) -> None:
        file.write(HEADER.pack(MAGIC, VERSION, self._code, self.documents, self.documents + 1))
        self._lengths.seek(0)
        shutil.copyfileobj(self._lengths, file)
        self._lengths.seek(0)
        offset = 0
        while block := self._lengths.read(4 * CHUNK):
            ends = offset + np.frombuffer(block, "<i4").cumsum(dtype=np.int64) * self.dtype.itemsize
            file.write(np.append(offset, ends[:-1]).astype("<i8").tobytes())
            offset = int(ends[-1])
        for start in range(0, self.documents + 1, CHUNK):
            file.write(np.arange(start, min(start + CHUNK, self.documents + 1), dtype="<i8").tobytes())


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


def read_index(prefix: Path) -> TokenIndex:
    """Open `<prefix>.idx` and check all of it, and the size of `<prefix>.bin` against it.

    Raises DamagedFile when a file is unreadable, truncated, of another format or inconsistent.
    """
    name, path = f"{prefix}.bin", f"{prefix}.idx"
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
        if (wrong := np.flatnonzero(part < 0)).size:
            at = start + int(wrong[0])
            raise DamagedFile(f"{path}: sequence {at}, at byte {HEADER.size + 4 * at}, has {part[wrong[0]]} tokens")
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
