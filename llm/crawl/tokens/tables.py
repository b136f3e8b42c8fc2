"""Reads columns of a stage's documents without making Python objects of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from llm.crawl.dedup.signatures import opened


def tables(path: Path, *columns: str) -> Iterator[pa.Table]:
    """The documents of a part, as many at a time as were written at once. Raises InputError where it is damaged."""
    with opened(path) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, columns, use_threads=False)
