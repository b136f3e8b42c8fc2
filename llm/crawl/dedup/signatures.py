"""Files of signatures: what the clustering needs of a task's documents, in sorted runs, with a checksum."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import xxhash

from llm.crawl._native import Signer
from llm.crawl.counts import Counts
from llm.crawl.documents import ADVICE, size_of, tables
from llm.errors import InputError
from llm.files import CHUNK, complete_file

FORMAT = 1
BLOCK = 1 << 18  # documents whose runs are sorted at a time
PAIR = np.dtype([("hash", "<u8"), ("document", "<u4")])  # document: its number in the block
CHECKSUM = 16  # bytes of XXH3-128 at the end of a file, before them 8 with the size of the footer
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Shape:
    """Of all signatures of a corpus."""

    shingle_words: int
    bands: int
    rows: int

    def signer(self) -> Signer:
        return Signer(self.shingle_words, self.bands, self.rows)


def read_texts(path: Path) -> Iterator[tuple[Array, list[str]]]:
    """Ids and texts of a part, some documents at a time. Raises InputError where it is damaged."""
    for table in tables(path, "id", "text"):
        yield table["id"].to_numpy(), table["text"].to_pylist()


def groups_with(file: pq.ParquetFile, ids: Array) -> Iterator[int]:
    """The row groups that may hold one of these ids, which ascend."""
    for group in range(file.num_row_groups):
        about: Any = file.metadata.row_group(group).column(0).statistics
        if about and np.searchsorted(ids, about.min) < np.searchsorted(ids, about.max, "right"):
            yield group


def write_signatures(path: Path, shape: Shape, texts: Iterator[tuple[Array, list[str]]], counts: Counts) -> None:
    """Sign documents, whose ids ascend, into a file: completely or not at all.

    A block: ids, int64; witnesses, uint64; the run of the hashes of whole documents, and one of each band, of PAIRs.
    """
    signer, blocks, digest = shape.signer(), list[int](), xxhash.xxh128()
    with complete_file(path) as file:

        def put(content: Any) -> None:
            digest.update(content)
            file.write(content)

        for ids, signatures in _blocks(signer, texts, counts):
            blocks.append(len(ids))
            put(np.ascontiguousarray(ids, "<i8"))
            put(np.ascontiguousarray(signatures[:, 0], "<u8"))
            pairs = np.empty(len(ids), PAIR)
            for column in range(1, signatures.shape[1]):
                order = np.argsort(signatures[:, column], kind="stable")
                pairs["hash"], pairs["document"] = signatures[order, column], order
                put(pairs.view(np.uint8))
        footer = json.dumps({"format": FORMAT, "shape": asdict(shape), "blocks": blocks}).encode()
        put(footer + len(footer).to_bytes(8, "little"))
        file.write(digest.digest())


def _blocks(signer: Signer, texts: Iterator[tuple[Array, list[str]]], counts: Counts) -> Iterator[tuple[Array, Array]]:
    """The ids and the signatures of BLOCK documents at a time."""
    ids, signatures, size = list[Array](), list[Array](), 0
    for some, documents in texts:
        counts.documents_in += len(documents)
        counts.bytes_in += sum(map(size_of, documents))
        ids.append(some)
        signatures.append(signer.sign([text.lower() for text in documents]))
        size += len(some)
        if size >= BLOCK:
            yield np.concatenate(ids), np.concatenate(signatures)
            ids, signatures, size = [], [], 0
    if size:
        yield np.concatenate(ids), np.concatenate(signatures)


@dataclass(frozen=True)
class Run:
    """PAIRs in a file, ascending by hash."""

    path: Path
    offset: int
    count: int
    base: int
    """The document that is called 0."""


@dataclass(frozen=True)
class SignatureFile:
    """A file of signatures that has been found whole."""

    path: Path
    shape: Shape
    blocks: tuple[int, ...]
    """Documents of each."""

    @cached_property
    def size(self) -> int:
        return sum(self.blocks)

    def runs(self, band: int, base: int) -> Iterator[Run]:
        """One of each block. band: -1 for the hashes of whole documents. base: the file's first document."""
        for offset, count in self._block_offsets():
            offset += count * (16 + PAIR.itemsize * (band + 1))
            yield Run(self.path, offset, count, base)
            base += count

    def ids(self) -> Array:
        return self._read(0, "<i8")

    def witnesses(self) -> Array:
        """Two documents have the same with the probability of their Jaccard similarity."""
        return self._read(8, "<u8")

    def _read(self, skipped: int, kind: str) -> Array:
        columns = [np.empty(0, kind)]
        for offset, count in self._block_offsets():
            columns.append(np.fromfile(self.path, kind, count, offset=offset + count * skipped))
        return np.concatenate(columns)

    def _block_offsets(self) -> Iterator[tuple[int, int]]:
        offset = 0
        for count in self.blocks:
            yield offset, count
            offset += count * (16 + PAIR.itemsize * (self.shape.bands + 1))


def open_signatures(path: Path, shape: Shape) -> SignatureFile:
    """Read a file of signatures through; raises InputError, which names it, unless it is whole and of this shape."""
    digest = xxhash.xxh128()
    try:
        with path.open("rb") as file:
            left = file.seek(0, 2) - CHECKSUM
            file.seek(0)
            while chunk := file.read(max(0, min(CHUNK, left))):
                digest.update(chunk)
                left -= len(chunk)
            if file.read() != digest.digest():
                raise InputError(f"{path} is damaged or cut: its checksum is not that of its content; {ADVICE}")
            file.seek(-CHECKSUM - 8, 2)
            size = int.from_bytes(file.read(8), "little")
            file.seek(-CHECKSUM - 8 - size, 2)
            footer = json.loads(file.read(size))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}; {ADVICE}") from error
    found, expected = (footer["format"], footer["shape"]), (FORMAT, asdict(shape))
    if found != expected:
        raise InputError(f"{path} is of format and shape {found}; expected {expected}; {ADVICE}")
    return SignatureFile(path, shape, tuple(footer["blocks"]))
