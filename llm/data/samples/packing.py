"""Best-fit packing: samples made of whole documents by a plan that is written ahead of training.

A document of L tokens is one piece if L <= T + 1. A longer one is cut into pieces of T + 1 tokens
that overlap by one token, so that each of its L - 1 targets lies in one of them, and a shorter rest.
A row holds pieces of T + 1 tokens at most; what they leave free is padding. No token is dropped.

The plan's file, little-endian: the header (magic, version, T, tokens of the corpus, rows R, pieces P,
tokens of all pieces), the pieces int64[P, 2] (first token in the corpus, tokens), and for each row
the number of pieces up to its end int64[R].
"""

from __future__ import annotations

import os
import secrets
import shutil
import struct
import tempfile
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llm.data.tokens.shards import ShardList, document_ends
from llm.errors import InputError, require

MAGIC = b"INGOTPLN"
VERSION = 1
HEADER = struct.Struct("<8sQQQQQQ")
WINDOW = 1 << 20  # pieces that are packed together
BLOCK = 1 << 20  # tokens searched for the ends of documents at a time


def document_ranges(shards: ShardList, seq_len: int, block: int) -> Iterator[NDArray[np.int64]]:
    """Documents of a corpus in order, as ranges [n, 2] (first token, tokens), for each `block` tokens read.

    Documents are told apart by the end-of-document token, as in samples cut from the stream.

    A document that goes on beyond a block is handed over as far as its whole pieces go; what follows
    of it begins with the last token of those. So memory does not grow with the longest document.
    """
    begin = 0
    for stop, ends in document_ends(shards, block):
        bounds = np.concatenate(([begin], ends))
        ranges = np.stack([bounds[:-1], np.diff(bounds)], axis=1)
        begin = int(bounds[-1])
        # The last token read may be the document's last, which only what follows it can tell.
        pieces = (stop - 2 - begin) // seq_len
        if pieces > 0:
            ranges = np.concatenate((ranges, [[begin, pieces * seq_len + 1]]))
            begin += pieces * seq_len
        yield ranges


def windows(ranges: Iterable[NDArray[np.int64]], seq_len: int, window: int) -> Iterator[NDArray[np.int64]]:
    """The ranges, gathered until they make about `window` pieces."""
    gathered: list[NDArray[np.int64]] = []
    pieces = 0
    for some in ranges:
        gathered.append(some)
        pieces += len(some) + int(some[:, 1].sum()) // seq_len
        if pieces >= window:
            yield np.concatenate(gathered)
            gathered, pieces = [], 0
    if pieces:
        yield np.concatenate(gathered)


def plan_window(documents: NDArray[np.int64], seq_len: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pieces [P, 2] of the documents [n, 2], row by row, and the pieces up to the end of each row [R].

    Best-fit decreasing: pieces from the longest to the shortest, equal ones in their order, each into
    the row with the least free space that suffices, among equals the one changed last; else into a
    new row. The twin of `_native.plan_window`, which write_plan uses.
    """
    cut = []
    for start, tokens in documents.tolist():
        whole = (tokens - 1) // seq_len
        cut += [(start + i * seq_len, seq_len + 1) for i in range(whole)]
        if tokens - whole * seq_len > 1 or whole == 0:
            cut.append((start + whole * seq_len, tokens - whole * seq_len))
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


@dataclass(frozen=True)
class PlanHeader:
    """What a plan says of itself."""

    seq_len: int
    corpus_tokens: int
    rows: int
    pieces: int
    piece_tokens: int
    """Tokens of all pieces: those of the corpus, and again each one where pieces of a document overlap."""

    @property
    def padding_share(self) -> float:
        """Share of all slots that hold no token."""
        return 1 - self.piece_tokens / (self.rows * (self.seq_len + 1))


def read_header(path: Path) -> PlanHeader:
    """The header of a plan, after checking it and the file's size.

    Raises InputError when the file cannot be read, or is no plan, truncated or damaged.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(HEADER.size)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise InputError(f"packing plan {path} cannot be read: {error}; prepare the data again") from error
    require(len(raw) == HEADER.size, f"packing plan {path} has {size} bytes, less than a header; it is truncated")
    magic, version, *counts = HEADER.unpack(raw)
    require(magic == MAGIC, f"packing plan {path} begins with {magic!r}; expected {MAGIC!r}")
    require(version == VERSION, f"packing plan {path} is of version {version}; expected {VERSION}")
    header = PlanHeader(*counts)
    rows, pieces = header.rows, header.pieces
    require(
        1 <= rows <= pieces and size == HEADER.size + 16 * pieces + 8 * rows,
        f"packing plan {path} has {size} bytes, which cannot be {rows} rows of {pieces} pieces; "
        "it is truncated or damaged",
    )
    require(
        header.corpus_tokens <= header.piece_tokens <= rows * (header.seq_len + 1),
        f"packing plan {path} has {header.piece_tokens} tokens in {rows} rows, which cannot be a corpus of "
        f"{header.corpus_tokens}; it is damaged",
    )
    return header


class NumpyPackPlan:
    """The NumPy twin of `_native.PackPlan`: a mapped plan, of which a row is checked when it is asked for."""

    def __init__(self, path: Path, seq_len: int, corpus_tokens: int) -> None:
        """InputError when the file is no plan for samples of `seq_len` tokens of a corpus of `corpus_tokens`."""
        self.path, self.header = path, read_header(path)
        found = self.header.seq_len, self.header.corpus_tokens
        require(
            found == (seq_len, corpus_tokens),
            f"packing plan {path} is of seq_len {found[0]} and a corpus of tokens {found[1]}; "
            f"expected {seq_len} and {corpus_tokens}; prepare the data again",
        )
        self._pieces = np.memmap(path, "<i8", "r", HEADER.size, (self.header.pieces, 2))
        self._row_ends = np.memmap(path, "<i8", "r", HEADER.size + self._pieces.nbytes, (self.header.rows,))

    def __len__(self) -> int:
        """Rows."""
        return self.header.rows

    def pieces(self, row: int) -> NDArray[np.int64]:
        """Pieces [n, 2] (first token, tokens) of a row. IndexError outside the plan, InputError if it is damaged."""
        if not 0 <= row < len(self):
            raise IndexError(f"packing plan {self.path}: row {row} lies outside its {len(self)} rows")
        first, last = int(self._row_ends[row - 1]) if row else 0, int(self._row_ends[row])
        require(
            0 <= first < last <= self.header.pieces,
            f"packing plan {self.path} is damaged: row {row} has pieces {first} to {last} of {self.header.pieces}",
        )
        pieces = np.array(self._pieces[first:last], np.int64)
        starts, tokens = pieces.T
        fits = (tokens >= 1) & (starts >= 0) & (starts <= self.header.corpus_tokens - tokens)
        require(
            bool(fits.all()) and sum(tokens.tolist()) <= self.header.seq_len + 1,
            f"packing plan {self.path} is damaged: row {row} has pieces (first token, tokens) {pieces.tolist()}, which "
            f"do not fit {self.header.seq_len + 1} slots and a corpus of {self.header.corpus_tokens} tokens",
        )
        return pieces

    def targets(self, row: int) -> int:
        """Targets of the row that count: all tokens but the first of each piece."""
        pieces = self.pieces(row)
        return int(pieces[:, 1].sum()) - len(pieces)


def write_plan(
    shards: ShardList,
    seq_len: int,
    path: Path,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> PlanHeader:
    """Plan samples of `seq_len` tokens for a corpus and write the plan, which appears only when whole.

    The same corpus gives the same bytes, in bounded memory. progress(stage, tokens done, tokens in all).
    Raises InputError when a file of the corpus is damaged.
    """
    from llm.data.native import import_native  # here: it needs this module, and plans are read without it

    native, total = import_native(), shards.n_tokens

    def ranges() -> Iterator[NDArray[np.int64]]:
        for i, found in enumerate(document_ranges(shards, seq_len, BLOCK), 1):
            yield found
            progress(f"packing samples of {seq_len} tokens", min(i * BLOCK, total), total)

    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    rows = pieces = piece_tokens = 0
    try:
        with temporary.open("wb") as file, tempfile.TemporaryFile(dir=path.parent) as ends:
            file.write(bytes(HEADER.size))
            for window in windows(ranges(), seq_len, WINDOW):
                packed, row_ends = native.plan_window(window, seq_len)
                file.write(packed.astype("<i8", copy=False).data)
                ends.write((row_ends + pieces).astype("<i8", copy=False).data)
                rows += len(row_ends)
                pieces += len(packed)
                piece_tokens += int(packed[:, 1].sum())
            ends.seek(0)
            shutil.copyfileobj(ends, file, BLOCK)
            file.seek(0)
            file.write(HEADER.pack(MAGIC, VERSION, seq_len, total, rows, pieces, piece_tokens))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return PlanHeader(seq_len, total, rows, pieces, piece_tokens)
