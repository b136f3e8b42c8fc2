"""Reads columns of a stage's documents without making Python objects of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from llm.errors import InputError


def row_groups(path: Path, *columns: str) -> Iterator[pa.RecordBatch]:
    """The documents of a part, as many at a time as were written at once. InputError where it is damaged."""
    try:
        with pq.ParquetFile(path) as file:
            for i in range(file.num_row_groups):
                table = file.read_row_group(i, columns, use_threads=False).combine_chunks()
                yield from table.to_batches()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read: {error}; remove it and its .json, and run its stage again") from error
