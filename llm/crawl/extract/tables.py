"""Reads tables that may have been made to harm: one text at a time, and nothing that memory does not hold."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

import pyarrow as pa

from llm.crawl.extract.pages import chunks, memory_of
from llm.crawl.extract.records import Damaged, Record
from llm.crawl.extract.settings import ExtractConfig
from llm.data.corpus.files import kind_of
from llm.data.corpus.tables import ROWS, arrow_texts, open_parquet, text_of, way_to
from llm.errors import InputError

PAGES = 16  # times extract.max_bytes: what the pages and texts of a table take that are in memory at once
GROWTH = 1024  # times the bytes of a file: what its texts may have in all, which for gzip is what is possible
ROW = 64  # bytes that each row counts as there, at least: one of no text takes time too

Texts: TypeAlias = tuple[int, pa.Array, pa.Array]
"""Rows of a table: the number of the first, from 1, their texts and their addresses."""


def read_rows(path: Path, settings: ExtractConfig, damaged: Damaged) -> Iterator[Record]:
    """The rows of a Parquet or Arrow file.

    Left out and told of: texts of more than extract.max_bytes, row groups of Parquet whose pages take more than 16
    times that, and what follows once the texts have 1024 times the bytes of the file.
    """
    limit, row, left = settings.max_bytes, 0, GROWTH * path.stat().st_size
    read = _parquet if kind_of(path) == "parquet" else _arrow
    try:
        for first, texts, urls in read(path, settings, damaged):
            for row, (text, url) in enumerate(zip(map(_buffer, texts), map(_buffer, urls), strict=True), first):
                size = text.size + url.size
                left -= max(size, ROW)
                if left < 0:
                    damaged(row, f"from here on the table is left out: it has {GROWTH} times the bytes of its file")
                    return
                if size > limit:
                    damaged(row, f"the text has more bytes than extract.max_bytes, {limit}")
                    continue
                try:
                    body = str(text, "utf-8")
                except UnicodeDecodeError as error:  # of a column of bytes
                    damaged(row, f"the text cannot be used: {error}")
                else:
                    yield Record(row, body, False, str(url, "utf-8", "replace"))
    except (InputError, OSError, ValueError, pa.ArrowException) as error:
        damaged(row + 1, f"the table cannot be read further: {error}")


def _buffer(cell: pa.Scalar) -> pa.Buffer:
    """The bytes of a text, not copied; none where it is null."""
    value = cell.value if isinstance(cell, pa.DictionaryScalar) else cell
    return value.as_buffer() if value.is_valid else pa.py_buffer(b"")


def _parquet(path: Path, settings: ExtractConfig, damaged: Damaged) -> Iterator[Texts]:
    """Few enough rows at a time that they fit, each with a text as large as a page: a dictionary may repeat one."""
    limit, row, seen = PAGES * settings.max_bytes, 1, 0
    with (
        open_parquet(path) as file,
        path.open("rb") as raw,
        mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        ways = [way_to(file.schema_arrow, settings.text_key, path)]
        if settings.url_key in file.schema_arrow.names:
            ways.append(way_to(file.schema_arrow, settings.url_key, path))
        columns = [".".join(way) for way in ways]
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            parts = chunks(group, columns)
            seen += sum(stop - start for start, stop in parts)
            if seen > len(content):
                raise ValueError("its row groups overlap")
            needed = sum(memory_of(content, *part) for part in parts)
            if needed > limit:
                what = f"row group {number} has pages of {needed} bytes; expected {PAGES} times extract.max_bytes"
                damaged(row, f"{what} at most, {limit}: it is left out")
            else:
                rows = max(1, min(ROWS, limit // max(1, needed)))
                first = row
                for batch in file.iter_batches(rows, [number], columns, use_threads=False):
                    texts, *urls = (text_of(batch.column(way[0]), way) for way in ways)
                    yield first, texts, urls[0] if urls else pa.nulls(len(texts))
                    first += len(batch)
            row += group.num_rows


def _arrow(path: Path, settings: ExtractConfig, damaged: Damaged) -> Iterator[Texts]:
    first = 1
    for texts in arrow_texts(path, settings.text_key):
        yield first, texts, pa.nulls(len(texts))
        first += len(texts)
