"""Files that are written whole: how they are cut, and their hashes."""

from __future__ import annotations

import hashlib
import os
import random
import socket
from itertools import pairwise
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from llm import files
from llm.errors import CheckpointError
from llm.files import (
    CHUNK,
    SPARSE,
    by_size,
    create,
    create_bytes,
    hash_of,
    mostly_holes,
    read_regular,
    read_up_to,
    sha256_of,
)


@given(sizes=st.lists(st.integers(0, 12)), limit=st.integers(1, 10))
def test_groups_are_as_few_as_their_order_allows(sizes: list[int], limit: int) -> None:
    groups = list(by_size(sizes, int, limit))
    assert [size for group in groups for size in group] == sizes
    assert all(group and (sum(group) <= limit or len(group) == 1) for group in groups)
    assert all(sum(group) + after[0] > limit for group, after in pairwise(groups))


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 7])
def test_the_hash_is_of_all_that_is_written(size: int, tmp_path: Path) -> None:
    content = random.Random(size).randbytes(size)
    expected = {"xxh128": xxhash.xxh3_128_hexdigest(content), "sha256": hashlib.sha256(content).hexdigest()}
    for algorithm, value in expected.items():
        parts = [content[: size // 3], b"", memoryview(content)[size // 3 :]]
        assert create(tmp_path / algorithm, parts, size, algorithm) == value
        assert (tmp_path / algorithm).read_bytes() == content
        assert hash_of(tmp_path / algorithm, algorithm) == value
    assert create_bytes(tmp_path / "whole", content) == (size, expected["xxh128"])


def test_the_hash_is_what_xxh128sum_prints(tmp_path: Path) -> None:
    """The published XXH128 of nothing, without a seed."""
    assert create(tmp_path / "empty", [], 0) == "99aa06d3014798d86001c324468d497f"


BLOCK = 1 << 16  # bytes: a multiple of what file systems take at once


def with_data(path: Path, blocks: int, at: list[int]) -> Path:
    """A file of which only some blocks were written."""
    with path.open("wb") as file:
        file.truncate(blocks * BLOCK)
        for i in at:
            file.seek(i * BLOCK)
            file.write(b"x" * BLOCK)
        os.fsync(file.fileno())
    return path


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([(SPARSE, [])], True),
        ([(SPARSE, [0])], False),
        ([(SPARSE, [SPARSE - 1])], False),
        ([(SPARSE + 1, [0])], True),
        ([(4 * SPARSE, [1, 9, 63])], True),
        ([(4 * SPARSE, [1, 9, 11, 63])], False),
        ([(SPARSE, []), (2, [0, 1])], False),
        ([(2, [0, 1]), (SPARSE, [])], False),
        ([(2 * SPARSE, []), (2, [0, 1])], True),
        ([(SPARSE - 1, [])], False),  # too small to matter
        ([], False),
    ],
)
def test_files_that_are_mostly_holes(
    parts: list[tuple[int, list[int]]], expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SPARSE_FROM", SPARSE * BLOCK)
    paths = [with_data(tmp_path / str(i), *part) for i, part in enumerate(parts)]
    assert mostly_holes(paths) == expected
    seek = os.lseek
    everywhere = {os.SEEK_DATA: lambda fd, at: at, os.SEEK_HOLE: lambda fd, at: os.fstat(fd).st_size}
    monkeypatch.setattr(os, "lseek", lambda fd, at, how: everywhere.get(how, lambda *_: seek(fd, at, how))(fd, at))
    assert not mostly_holes(paths)  # on a file system that knows no holes


def test_what_is_mostly_holes_is_not_hashed(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        file.write(b"x")
        file.truncate(200 << 30)
    with pytest.raises(OSError, match="has 214748364800 bytes, most of which were never written to the disk"):
        sha256_of(tmp_path / "file")


@pytest.mark.parametrize("kind", ["file", "link", "link to nothing"])
def test_create_takes_no_place_that_is_taken(kind: str, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"a victim's")
    path = tmp_path / ("other" if kind == "file" else "link")
    if kind != "file":
        path.symlink_to(tmp_path / ("other" if kind == "link" else "new"))
    with pytest.raises(FileExistsError):
        create(path, [b"x"], 1)
    assert (tmp_path / "other").read_bytes() == b"a victim's" and not (tmp_path / "new").exists()


def test_a_file_of_at_most_so_many_bytes_is_read(tmp_path: Path) -> None:
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_bytes(b"12345")
    link.symlink_to(path)
    assert read_up_to(path, 5) == read_up_to(link, 5) == read_regular(path, 5) == b"12345"
    assert Path("/proc/self/status").stat().st_size == 0 and len(read_up_to("/proc/self/status", 1 << 16)) > 100
    with pytest.raises(OSError, match="is no file of at most 4 bytes"):
        read_up_to(path, 4)
    with pytest.raises(OSError, match="is no file of at most 9 bytes"):
        read_up_to("/proc/self/status", 9)
    with pytest.raises(CheckpointError, match="file cannot be read: is no file of at most 4 bytes"):
        read_regular(path, 4)


@pytest.mark.parametrize("kind", ["link", "link to itself", "pipe", "folder", "socket", "nothing"])
def test_what_is_no_regular_file_is_refused_at_once(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("tried again"))
    monkeypatch.chdir(tmp_path)  # a socket's path may have 108 bytes
    path = tmp_path / "file"
    (tmp_path / "other").write_bytes(b"1")
    if kind.startswith("link"):
        path.symlink_to("other" if kind == "link" else "file")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind("file")
    with pytest.raises(CheckpointError, match=r"is not a regular file|No such file"):
        read_regular(path, 5)
    if kind != "link":
        with pytest.raises(OSError, match="file"):
            read_up_to(path, 5)
