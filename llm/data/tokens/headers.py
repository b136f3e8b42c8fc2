"""Reads and checks the header of a token file in constant time. csrc/core/token_file.cpp does the same.

All formats are little-endian and hold ids one after another.

- raw: `<name>.bin`, ids alone (nanoGPT).
- megatron: `<name>.bin`, ids alone; `<name>.idx` says where each document lies (llm/data/tokens/megatron.py).
- llm.c: `<name>.bin`, a header of 256 int32 (magic number, version, count of tokens), then ids.
- datatrove: `<name>.ds`, ids alone; `<name>.ds.index` holds the end of each document in tokens as uint64. There may be
  a `<name>.ds.metadata` of two lines: tokenizer|bytes of an id, and the count of tokens.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from llm.errors import DamagedFile, require

# Megatron's index: magic, version, dtype code, count of sequences, count of document boundaries (documents + 1).
MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
CODES = {"uint8": 1, "uint16": 8, "int32": 4}  # Megatron's dtype codes

LLMC_HEADER = 256 * 4
LLMC_VERSIONS = {"uint16": (20240520, 1), "uint32": (20240801, 7)}  # magic number and version

DTYPES = {
    "raw": ("uint8", "uint16", "int32", "uint32"),
    "megatron": tuple(CODES),
    "llm.c": ("uint16", "uint32"),
    "datatrove": ("uint16", "uint32"),
}
MACHINE_SHORT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # says nothing of the file


class File:
    """A regular file, open for reading; DamagedFile where it cannot be."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:  # O_NONBLOCK: a named pipe is refused below instead of blocking the open
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            if error.errno in MACHINE_SHORT:
                raise
            raise DamagedFile(f"{path}: cannot be opened: {error.strerror}") from error
        info = os.fstat(self._fd)
        self.size = info.st_size
        if not stat.S_ISREG(info.st_mode):
            os.close(self._fd)
            self.fail("is not a regular file")

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def fail(self, what: str) -> NoReturn:
        raise DamagedFile(f"{self.path}: {what}")

    def read(self, offset: int, count: int) -> bytes:
        try:
            found = os.pread(self._fd, count, offset)
        except OSError as error:
            raise DamagedFile(f"{self.path}: cannot be read at byte {offset}: {error.strerror}") from error
        if len(found) != count:
            self.fail(f"cannot be read at byte {offset}: it ends there, truncated")
        return found

    def number(self, offset: int, kind: str) -> int:
        return struct.unpack(f"<{kind}", self.read(offset, struct.calcsize(f"<{kind}")))[0]

    def expect(self, offset: int, kind: str, name: str, expected: int) -> None:
        found = self.number(offset, kind)
        if found != expected:
            self.fail(f"{name} at byte {offset} is {found}, expected {expected}")


def index_path(path: str, format: str) -> str | None:
    """The file that says where the documents of a token file lie, in the formats that have one."""
    return {"megatron": path.removesuffix(".bin") + ".idx", "datatrove": f"{path}.index"}.get(format)


def check_request(path: str, format: str, dtype: str, tokens: int) -> int:
    """Bytes before the first id. ValueError where no file of the format can hold `tokens` ids of `dtype`."""
    if format not in DTYPES:
        raise ValueError(f'format "{format}"; expected raw, megatron, llm.c or datatrove')
    if dtype not in DTYPES[format]:
        raise ValueError(f"{path}: ids of {dtype}; expected {', '.join(DTYPES[format])} in {format} files")
    if not 1 <= tokens <= (2**63 - 1 - LLMC_HEADER) // np.dtype(dtype).itemsize:
        raise ValueError(f"{path}: impossible token count {tokens}")
    if format == "megatron" and not path.endswith(".bin"):
        raise ValueError(f"{path}: a token file of Megatron ends in .bin")
    return header_bytes(format)


def header_bytes(format: str) -> int:
    """Of a token file, before its first token."""
    return LLMC_HEADER if format == "llm.c" else 0


def check_header(path: str, format: str, dtype: str, tokens: int) -> int:
    """Check, in constant time, that the file holds `tokens` ids of `dtype`; returns the bytes before the first.

    Raises DamagedFile (the file is not so) or ValueError (no file can be).
    """
    before = check_request(path, format, dtype, tokens)
    width = np.dtype(dtype).itemsize
    with File(path) as file:
        expected = before + tokens * width
        if file.size != expected:
            file.fail(f"has {file.size} bytes, expected {expected} ({tokens} tokens of {width} bytes)")
        if format == "llm.c":
            magic, version = LLMC_VERSIONS[dtype]
            file.expect(0, "i", "the magic number", magic)
            file.expect(4, "i", "the version", version)
            file.expect(8, "i", "the count of tokens", tokens)
    if format == "megatron":
        _check_megatron(path, dtype, tokens)
    if format == "datatrove":
        with File(str(index_path(path, format))) as index:
            if index.size < 8 or index.size % 8:
                index.fail(f"has {index.size} bytes, expected 8 for each document")
            index.expect(index.size - 8, "q", "the end of the last document", tokens)
    return before


def _megatron_counts(file: File, least: int) -> tuple[int, int]:
    """Sequences, `least` or more, and document boundaries of an .idx file that has room for exactly so many."""
    if file.read(0, len(MAGIC)) != MAGIC:
        file.fail("does not begin with MMIDIDX as an index of Megatron does")
    file.expect(9, "q", "the version", VERSION)
    sequences, boundaries = struct.unpack("<qq", file.read(18, 16))
    counts = f"{sequences} sequences and {boundaries} boundaries"
    if sequences < least or boundaries < least + 1:
        file.fail(f"holds no document: {counts} at byte 18")
    if file.size != HEADER.size + 12 * sequences + 8 * boundaries:
        file.fail(f"has {file.size} bytes, which is not what its {counts} take")
    return sequences, boundaries


def _check_megatron(path: str, dtype: str, tokens: int) -> None:
    with File(str(index_path(path, "megatron"))) as file:
        sequences, _ = _megatron_counts(file, 1)
        file.expect(17, "B", "the dtype code", CODES[dtype])
        offsets = HEADER.size + 4 * sequences
        bounds = offsets + 8 * sequences
        last = file.number(offsets - 4, "i")
        if not 0 <= last <= tokens:
            file.fail(f"the last sequence, at byte {offsets - 4}, has {last} of {tokens} tokens")
        file.expect(offsets, "q", "the first offset", 0)
        file.expect(bounds - 8, "q", "the last offset", (tokens - last) * np.dtype(dtype).itemsize)
        file.expect(bounds, "q", "the first boundary", 0)
        file.expect(file.size - 8, "q", "the last boundary", sequences)


def check_metadata(path: str, dtype: str, tokens: int) -> None:
    """Compare datatrove's `<name>.ds.metadata`, if there is one, with what the index says; raises DamagedFile."""
    if not os.path.exists(f"{path}.metadata"):
        return
    with File(f"{path}.metadata") as file:
        lines = file.read(0, min(file.size, 4096)).decode("utf-8", "replace").splitlines()
        found = (lines[0].rpartition("|")[2], lines[1]) if len(lines) >= 2 else tuple(lines)
        expected = (str(np.dtype(dtype).itemsize), str(tokens))
        if found != expected:
            file.fail(f"says bytes of an id and tokens {found}, expected {expected}")


@dataclass(frozen=True)
class Header:
    """What a token file is, as it says itself."""

    format: str
    dtype: str
    tokens: int


def read_header(path: str, raw_dtype: str) -> Header:
    """Find out the format of a token file (.bin or .ds) and check its header or index, in constant time.

    A .bin file without an .idx file beside it and without llm.c's magic number is raw: ids of `raw_dtype`.
    A file may have no tokens. Raises DamagedFile, and InputError for datatrove's loss masks.
    """
    header = _describe(path, raw_dtype)
    if header.tokens < 1:
        if header.tokens < 0 or os.stat(path).st_size != header_bytes(header.format):
            raise DamagedFile(f"{path}: holds {header.tokens} tokens, it says, which is not what its size is")
        return header
    check_header(path, header.format, header.dtype, header.tokens)
    if header.format == "datatrove":
        check_metadata(path, header.dtype, header.tokens)
        masked = os.path.exists(f"{path}.loss")
        require(not masked, f"{path}.loss masks targets, which is not supported; without it every token is a target")
    return header


def _describe(path: str, raw_dtype: str) -> Header:
    with File(path) as file:
        if path.endswith(".ds"):
            return _describe_datatrove(path, file.size)
        if os.path.exists(str(index_path(path, "megatron"))):
            return describe_megatron(path)
        magic = file.number(0, "i") if file.size >= 4 else None
        for dtype, (known, _) in LLMC_VERSIONS.items():
            if magic == known:
                return Header("llm.c", dtype, file.number(8, "i"))
        tokens, rest = divmod(file.size, np.dtype(raw_dtype).itemsize)
        if rest:
            file.fail(f"has {file.size} bytes, which is no whole number of {raw_dtype} ids")
        return Header("raw", raw_dtype, tokens)


def describe_megatron(path: str) -> Header:
    """What the .idx file beside `path` says: its dtype, and the tokens up to the end of its last sequence."""
    with File(str(index_path(path, "megatron"))) as index:
        sequences, _ = _megatron_counts(index, 0)
        code = index.number(17, "B")
        dtype = next((name for name, known in CODES.items() if known == code), None)
        if dtype is None:
            known = ", ".join(f"{code} ({name})" for name, code in CODES.items())
            index.fail(f"the dtype code at byte 17 is {code}, expected {known}")
        if sequences == 0:
            return Header("megatron", dtype, 0)
        lengths_end = HEADER.size + 4 * sequences
        last, offset = index.number(lengths_end - 4, "i"), index.number(lengths_end + 8 * sequences - 8, "q")
        tokens = offset // np.dtype(dtype).itemsize + last
        if last < 0 or not 0 <= offset < 2**62:
            index.fail(f"the last sequence has {last} tokens from byte {offset} on, expected neither below 0")
    return Header("megatron", dtype, tokens)


def _describe_datatrove(path: str, size: int) -> Header:
    """The index counts tokens, so that the size gives the bytes of an id."""
    with File(str(index_path(path, "datatrove"))) as file:
        tokens = file.number(file.size - 8, "q") if file.size >= 8 else 0
    widths = {2 * tokens: "uint16", 4 * tokens: "uint32"}
    if tokens < 0 or size not in widths:
        file.fail(f"its last document ends at token {tokens}, but {path} has {size} bytes, expected 2 or 4 for each")
    return Header("datatrove", widths[size], tokens)
