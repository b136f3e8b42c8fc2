"""Parquet and Arrow files: what a table claims to hold costs no more than what other inputs may."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from warc_files import extract

from llm.crawl.extract import tables
from llm.crawl.extract.pages import DEEPEST, VALUE, chunks, memory_of, pages

ROOT = Path(__file__).resolve().parents[3]
TEXTS = [f"text {i} " + "of words " * (i % 50) for i in range(3_000)]
WAYS = {
    "plain": {"use_dictionary": False},
    "dictionary": {"use_dictionary": True, "data_page_size": 2_000, "dictionary_pagesize_limit": 10_000},
    "version 2": {"data_page_version": "2.0", "data_page_size": 5_000, "compression": "zstd"},
    "checksums": {"write_page_checksum": True, "compression": "none", "write_statistics": False},
}


def parquet(path: Path, column: pa.Array, **options: object) -> Path:
    """A file of the column `text`. store_schema: not, so that a dictionary is read as text."""
    options = {"compression": "zstd", "store_schema": False} | options
    pq.write_table(pa.table({"text": column}), path, **options)  # pyright: ignore
    return path


def repeated(text: str, rows: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([text]))


@pytest.mark.parametrize("way", WAYS)
def test_headers_say_what_the_footer_adds_up(tmp_path: Path, way: str) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": TEXTS}), path, **WAYS[way])
    content, about = path.read_bytes(), pq.read_metadata(path)
    for number in range(about.num_row_groups):
        column = about.row_group(number).column(0)
        ((start, stop),) = chunks(about.row_group(number), ["text"])
        found = list(pages(content, start, stop))
        assert found[-1].end == stop == start + column.total_compressed_size
        heads = stop - start - sum(page.end - page.begin for page in found)
        assert sum(page.size for page in found) + heads == column.total_uncompressed_size
        dictionary = found[:1] if column.has_dictionary_page else []
        assert sum(page.values for page in found[len(dictionary) :]) == column.num_values
        assert memory_of(content, start, stop) == max(max(page.size, VALUE * page.values) for page in found)
    assert [d.text for d in extract(path)[0]] == TEXTS


def test_the_parts_of_a_column_are_those_of_its_fields(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": pa.array([{"b": "x", "bc": {"d": 1}}]), "a.b": ["y"], "ab": ["z"]}), path)
    group = pq.read_metadata(path).row_group(0)
    names = [group.column(i).path_in_schema for i in range(group.num_columns)]
    assert names == ["a.b", "a.bc.d", "a.b", "ab"]
    every = chunks(group, names)
    assert chunks(group, ["a.b"]) == [every[0], every[2]] and chunks(group, ["a.bc"]) == [every[1]]


def header(*fields: int) -> bytes:
    """A page's header: fields of 32 bits by number, from 1 on, up to 63 each."""
    return b"".join(bytes([0x15, value << 1]) for value in fields) + b"\0"


def test_a_header_that_says_two_things_is_refused() -> None:
    good = header(0, 5, 3)
    (page,) = pages(good + b"abc", 0, 1)
    assert (page.size, page.begin, page.end) == (5, len(good), len(good) + 3)
    for bad in (
        good[:-1] + b"\x05\x04\x0a\0",  # field 2 again: libraries may take either
        header(0, 5),  # no size
        b"\x15\x00\x15\x09" + good[4:],  # less than nothing
        b"\x1c" * (DEEPEST + 1) + b"\0" * (DEEPEST + 1) + good,
        b"\x19\xf1" + b"\xff" * 8 + b"\x7f" + good,  # a list of 2^62 values
        b"\x15" + b"\xff" * 11,
        b"\x1b\x01" + good,  # a map
        good[:3],
    ):
        with pytest.raises(ValueError, match="page"):
            list(pages(bad + b"abc" * 5, 0, 1))
    with pytest.raises(ValueError, match="said to have 3 bytes"):
        list(pages(good + b"ab", 0, 1))
    assert next(pages(b"\x15\x00" + b"\x05\x84\x80\x08\x0a" + b"\x15\x00\0", 0, 1)).size == 5  # 65538 is 2 of 16 bits


@pytest.mark.parametrize("encoding", ["DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_encodings_that_may_claim_any_memory_are_refused(tmp_path: Path, encoding: str, version: str) -> None:
    options = {"use_dictionary": False, "column_encoding": encoding, "data_page_version": version}
    documents, counts = extract(parquet(tmp_path / "a.parquet", pa.array(TEXTS), **options))
    assert not documents and "expected PLAIN or a dictionary" in str(counts.damage[0]["what"])


@settings(max_examples=300, deadline=None)
@given(content=st.binary(max_size=60))
def test_any_bytes_are_pages_or_refused(content: bytes) -> None:
    with suppress(ValueError):
        assert all(page.end <= len(content) for page in pages(content, 0, len(content)))


def test_a_row_group_with_too_large_a_page_is_left_out(tmp_path: Path) -> None:
    texts = [f"{i} " + "x" * (100 if 20 <= i < 40 else 10) for i in range(60)]
    path = parquet(tmp_path / "a.parquet", pa.array(texts), row_group_size=20, use_dictionary=False)
    documents, counts = extract(path, max_bytes=110)
    assert [(d.offset, d.text) for d in documents] == [(i + 1, texts[i]) for i in (*range(20), *range(40, 60))]
    ((damage,), count) = counts.damage, counts.damage_count
    assert count == 1 and damage["offset"] == 21 and "row group 1 has pages of" in str(damage["what"])
    assert [d.text for d in extract(path, max_bytes=200)[0]] == texts
    parquet(path, pa.nulls(2_000, pa.string()))  # of no bytes, but as many values
    assert "has pages of 32000 bytes" in str(extract(path, max_bytes=1_000)[1].damage[0]["what"])
    assert extract(path, max_bytes=2_000)[1].removed


def test_few_rows_are_read_where_each_may_be_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, real = list[int](), pq.ParquetFile.iter_batches

    def noted(self: pq.ParquetFile, size: int, *rest: object, **more: object) -> object:
        sizes.append(size)
        return real(self, size, *rest, **more)  # pyright: ignore

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", noted)
    path = parquet(tmp_path / "a.parquet", repeated("x" * 900, 50))
    documents, _ = extract(path, max_bytes=1_000)
    assert len(documents) == 50 and sizes == [16_000 // 904]
    parquet(path, repeated("x" * 9, 50))
    assert len(extract(path)[0]) == 50 and sizes[1] == 128


def test_a_table_grows_so_much_and_no_further(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", repeated("x" * 5_000, 1_000))
    most = tables.GROWTH * path.stat().st_size
    documents, counts = extract(path)
    assert len(documents) == most // 5_000 < 1_000
    assert [(one["offset"]) for one in counts.damage] == [len(documents) + 1]
    parquet(path, pa.nulls(100_000, pa.string()))
    documents, counts = extract(path)
    assert not documents and counts.damage_count == 1
    assert counts.removed == {"extract.empty": tables.GROWTH * path.stat().st_size // tables.ROW}


def test_row_groups_that_lie_on_one_another_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parquet(tmp_path / "a.parquet", pa.array(TEXTS), row_group_size=1_000)
    size = path.stat().st_size
    monkeypatch.setattr(tables, "chunks", lambda group, columns: [(*chunks(group, columns)[0],), (4, 4 + size // 2)])
    documents, counts = extract(path)
    assert len(documents) < len(TEXTS) and "its row groups overlap" in str(counts.damage[0]["what"])


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), "dictionary"])
def test_every_kind_of_text(tmp_path: Path, kind: pa.DataType | str) -> None:
    column = pa.array(["one", None, "", "zwölf"])
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(kind)
    path = tmp_path / "a.arrow"
    with pa.ipc.new_file(path, pa.schema([("text", column.type)])) as writer:
        writer.write_batch(pa.record_batch([column], ["text"]))
    for found in (path, parquet(tmp_path / "a.parquet", column, store_schema=True)):
        documents, counts = extract(found)
        assert [(d.text, d.offset) for d in documents] == [("one", 1), ("zwölf", 4)]
        assert counts.removed == {"extract.empty": 2} and not counts.damage


def test_bytes_that_are_no_text_are_left_out(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", pa.array([b"one", b"\xff", b"two"]))
    documents, counts = extract(path)
    assert [(d.text, d.offset) for d in documents] == [("one", 1), ("two", 3)]
    assert [one["offset"] for one in counts.damage] == [2]


def test_the_text_may_be_the_address(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"url": ["u"]}), path)
    assert [(d.text, d.url) for d in extract(path, text_key="url")[0]] == [("u", "u")]
    pq.write_table(pa.table([["u"], ["v"]], ["text", "text"]), path)
    assert extract(path)[1].damage_count == 1  # which of them?


# Not ru_maxrss, in which the memory of the process that it was started from is counted.
READ = """
import sys
from pathlib import Path
from llm.crawl.counts import Counts
from llm.crawl.extract.settings import ExtractConfig
from llm.crawl.extract.stage import Extract
from llm.crawl.tasks import Task
for path in sorted(Path(sys.argv[1]).iterdir()):
    counts = Counts()
    documents = sum(1 for _ in Extract(ExtractConfig()).run(Task(0, (path,), path.parent), counts))
    print(path.name, documents, counts.damage_count, path.stat().st_size >> 10)
print(int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) >> 10)
"""


def read_in_a_process(folder: Path) -> tuple[dict[str, list[int]], int]:
    """Documents, damages and KiB of each file, and the MiB of memory that a process takes for them."""
    done = subprocess.run(
        [sys.executable, "-c", READ, str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    *files, memory = done.stdout.splitlines()
    return {name: list(map(int, rest)) for name, *rest in map(str.split, files)}, int(memory)


@pytest.mark.slow
def test_bombs_cost_little_memory(tmp_path: Path) -> None:
    """Files of some KiB: texts of 256 and of 240 MiB, 20 times; of 16 MiB, 1,000 times; 2 x 10^6 rows of nothing."""
    mebibyte = 1 << 20
    parquet(tmp_path / "page.parquet", repeated("a" * (256 * mebibyte), 20))
    parquet(tmp_path / "cell.parquet", repeated("a" * (240 * mebibyte), 20))
    parquet(tmp_path / "text.parquet", repeated("a" * (16 * mebibyte), 1_000))
    parquet(tmp_path / "null.parquet", pa.nulls(2 * 10**6), row_group_size=10**6)
    found, memory = read_in_a_process(tmp_path)
    assert {name: counts[1] for name, counts in found.items()} == dict.fromkeys(found, 1)
    assert max(counts[2] for counts in found.values()) < 100
    assert memory < 2048


@pytest.mark.slow
def test_a_large_table_costs_little_memory(tmp_path: Path) -> None:
    """400 MiB that no compression makes smaller, in two row groups."""
    rng = np.random.default_rng(1)
    text = pa.array([rng.integers(33, 127, 50_000, np.uint8).tobytes().decode() for _ in range(8_000)])
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet", row_group_size=4_000, use_dictionary=False)
    found, memory = read_in_a_process(tmp_path)
    assert found["a.parquet"][:2] == [8_000, 0] and found["a.parquet"][2] > 300 << 10
    assert memory < 500
