"""The Parquet files between the stages: what is in memory at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm.crawl.documents import BYTES, Document, read_documents, tables, write_documents
from llm.errors import InputError


def test_long_texts_are_read_few_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "00000.parquet"
    documents = [Document(i, "x" * (BYTES // 2), "", "", i, metadata={"n": str(i)}) for i in range(5)]
    write_documents(path, iter(documents))
    assert [table.num_rows for table in tables(path, "text")] == [2, 2, 1]
    assert list(read_documents(path)) == documents


@pytest.mark.parametrize("content", [b"", b"PAR1"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "00000.parquet").write_bytes(content)
    with pytest.raises(InputError, match=r"00000.parquet cannot be read: .*run its stage again"):
        list(read_documents(tmp_path / "00000.parquet"))
