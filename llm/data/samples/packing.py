"""Best-fit packing: samples made of whole documents by a plan (llm/data/prepare/plans.py) written ahead of training.

A document of L tokens is one piece if L <= T + 1. A longer one is cut into pieces of T + 1 tokens, and a shorter last
one. Pieces overlap by one token, so each of the document's L - 1 targets is in exactly one piece. A row holds pieces of
at most T + 1 tokens together; what they leave free is padding. No token is dropped.

The plan's file, little-endian: the header (magic, version, T, tokens of the corpus, rows R, pieces P,
tokens of all pieces), the pieces int64[P, 2] (first token in the corpus, tokens), and for each row
the number of pieces up to its end int64[R].
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llm.errors import InputError, require

MAGIC = b"INGOTPLN"
VERSION = 1
HEADER = struct.Struct("<8sQQQQQQ")


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
