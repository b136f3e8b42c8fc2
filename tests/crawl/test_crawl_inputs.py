"""The files of the raw input: how they are found, named, limited and known."""

from __future__ import annotations

import os
from pathlib import Path

import fsspec
import pytest
from toy_stages import content, run_toys, toys, write_input

from llm.crawl.engines.local import Local
from llm.crawl.inputs import input_tasks
from llm.crawl.settings import InputConfig
from llm.errors import InputError


@pytest.fixture
def crawl(tmp_path: Path) -> Path:
    for name in ("b/1.warc.gz", "b/2.warc.gz", "a.warc.gz", ".hidden", "b/.part", "c.html"):
        path = tmp_path / "crawl" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "crawl"


def sources(source: str | Path, **settings: int) -> list[str]:
    return [task.source for task in input_tasks(InputConfig(str(source), **settings), Path("out"))]


def test_files_are_named_from_the_folder_on_in_order(crawl: Path) -> None:
    assert sources(crawl) == ["a.warc.gz", "b/1.warc.gz", "b/2.warc.gz", "c.html"]
    assert sources(f"{crawl}/b/*.gz") == ["1.warc.gz", "2.warc.gz"]
    assert sources(f"{crawl}/*/*.gz") == ["b/1.warc.gz", "b/2.warc.gz"]
    assert sources(f"{crawl}/**/*.gz") == ["a.warc.gz", "b/1.warc.gz", "b/2.warc.gz"]
    assert sources(crawl / "b/2.warc.gz") == ["2.warc.gz"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "input.source is not set"),
        ("/nowhere/at/all", "input.source /nowhere/at/all: found no file"),
        ("/nowhere/*.gz", "found no file"),
        ("nosuch://x/y", "input.source nosuch://x/y cannot be opened: Protocol not known: nosuch"),
    ],
)
def test_no_input_is_an_error(source: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        sources(source)


def test_a_limit_is_shared_out_among_the_first_files(crawl: Path) -> None:
    def limits(limit: int | None) -> list[int | None]:
        return [task.limit for task in input_tasks(InputConfig(str(crawl), limit), Path("out"))]

    assert limits(None) == [None] * 4
    assert limits(10) == [3, 3, 2, 2]
    assert limits(2) == [1, 1]
    with pytest.raises(InputError, match=r"input.limit is 0; expected at least 1"):
        limits(0)


def test_a_file_is_known_by_name_size_content_and_limit(crawl: Path) -> None:
    def known(**settings: int) -> list[str]:
        return [task.identity for task in input_tasks(InputConfig(str(crawl), **settings), Path("out"))]

    first = known()
    assert len(set(first)) == 4 and known() == first
    assert not set(known(limit=8)) & set(first)
    (crawl / "c.html").write_text("c.htmx")
    assert [old == new for old, new in zip(first, known(), strict=True)] == [True, True, True, False]
    large = crawl / "c.html"
    large.write_bytes(b"0" * 300_000)
    before = known()[3]
    large.write_bytes(b"0" * 150_000 + b"1" + b"0" * 149_999)
    assert known()[3] != before


def test_a_remote_input_gives_the_same_and_leaves_no_copy(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in")
    system = fsspec.filesystem("memory")
    system.put(f"{source}/", "/bucket/crawl/", recursive=True)
    try:
        for out, origin in ((tmp_path / "near", source), (tmp_path / "far", "memory://bucket/crawl")):
            run_toys(origin, out, Local(toys, 1))
    finally:
        system.rm("/bucket", recursive=True)
    parts = [
        {name: found for name, found in content(tmp_path / out).items() if "parquet" in name} for out in ("near", "far")
    ]
    assert parts[0] == parts[1]
    assert not list((tmp_path / "far").glob("*/*.tmp"))


def test_a_name_that_is_no_text_is_spelled(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9\n.warc")).write_text("content")
    (task,) = input_tasks(InputConfig(str(tmp_path)), Path("out"))
    assert task.source == "caf\\xe9\n.warc" and task.inputs[0].read_text() == "content"


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "lost.warc").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"input.source .* cannot be opened: .*lost.warc"):
        sources(tmp_path)


def test_a_store_may_have_empty_folder_names() -> None:
    system = fsspec.filesystem("memory")
    system.pipe("/twice//1.warc", b"content")
    try:
        assert sources("memory://twice") == ["1.warc"]
    finally:
        system.rm("/twice", recursive=True)


def test_the_output_is_never_input(crawl: Path) -> None:
    for source in (crawl, f"{crawl}/**/*.gz"):
        with pytest.raises(InputError, match=r"out .* lies in input.source .*: choose another out"):
            input_tasks(InputConfig(str(source)), crawl / "out/extract")
    assert len(input_tasks(InputConfig(f"{crawl}/*.gz"), crawl / "out/extract")) == 1
