"""The unit of all stages, and the Parquet files in which one stage leaves it for the next."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from llm.errors import InputError
from llm.files import complete_file

ROWS = 1024  # documents that are in memory at a time, at most
BYTES = 16 << 20  # of text, likewise
ADVICE = "delete it and its .json, and run its stage again"
SCHEMA = pa.schema((
    ("id", pa.int64()), ("text", pa.large_string()), ("url", pa.string()), ("source", pa.string()),
    ("offset", pa.int64()), ("language", pa.string()), ("metadata", pa.string()),
))  # fmt: skip


@dataclass(slots=True)
class Document:
    """A text, and where it comes from."""

    id: int
    """The task's number << 32 | the record's number in its file: unique, and in the order of the input."""
    text: str
    url: str
    """"" where it is not known."""
    source: str
    """The input file, relative to the input's folder."""
    offset: int
    """Of the record in the file: in bytes, or its line or row."""
    language: str = ""
    """ISO 639 code, from the filter stage on."""
    metadata: dict[str, str] = field(default_factory=dict[str, str])
    """Date, MIME type, charset and the like."""


def size_of(text: str) -> int:
    """Bytes of UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def write_documents(path: Path, documents: Iterable[Document]) -> None:
    """Write a file of documents, completely or not at all, the same bytes for the same documents."""
    with complete_file(path) as file, pq.ParquetWriter(file, SCHEMA, compression="zstd", compression_level=1) as writer:
        rows, size = list[Document](), 0
        for document in documents:
            rows.append(document)
            size += len(document.text)
            if len(rows) >= ROWS or size >= BYTES:
                writer.write_batch(_batch(rows))
                rows, size = [], 0
        writer.write_batch(_batch(rows))


def _batch(rows: list[Document]) -> pa.RecordBatch:
    columns = [[getattr(row, name) for row in rows] for name in SCHEMA.names[:-1]]
    columns.append([json.dumps(row.metadata, ensure_ascii=False, sort_keys=True) for row in rows])
    return pa.record_batch([pa.array(column, kind) for column, kind in zip(columns, SCHEMA.types, strict=True)], SCHEMA)


def read_documents(path: Path) -> Iterator[Document]:
    """The documents of a file, in order. Raises InputError where it is damaged."""
    try:
        for table in tables(path):
            for row in table.to_pylist():
                yield Document(**(row | {"metadata": json.loads(row["metadata"])}))
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} cannot be read: {error}; {ADVICE}") from error


def tables(path: Path, *columns: str) -> Iterator[pa.Table]:
    """Columns of a file, none: all; as many rows at a time as were written at once. InputError where it is damaged."""
    with opened(path) as file:
        for group in range(file.num_row_groups):  # iter_batches would join groups, however large their texts are
            yield file.read_row_group(group, columns or None, use_threads=False)


@contextmanager
def opened(path: Path) -> Iterator[pq.ParquetFile]:
    """A Parquet file; raises InputError where it is damaged."""
    try:
        # Row groups are small: to fetch them in advance costs a copy, and threads.
        with pq.ParquetFile(path, pre_buffer=False, page_checksum_verification=True) as file:
            yield file
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read: {error}; {ADVICE}") from error
