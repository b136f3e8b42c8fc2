"""The thread that hashes token files while a run trains."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import pytest

from llm.data.tokens.hashes import HashCheck, file_entry
from llm.data.tokens.manifest import FileEntry
from llm.errors import InputError


@pytest.fixture
def files(tmp_path: Path) -> dict[str, FileEntry]:
    """Seven files of 3 MB."""
    found = {}
    for i in range(7):
        path = tmp_path / f"{i}.bin"
        path.write_bytes(os.urandom(3 << 20))
        found[str(path)] = file_entry(path)
    return found


@pytest.fixture
def giant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, FileEntry]:
    """A sparse file that takes many minutes to hash, and is hashed all the same."""
    monkeypatch.setattr("llm.files.SPARSE_FROM", 1 << 41)
    path = tmp_path / "giant.bin"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    return {str(path): FileEntry(1 << 40, "ab" * 32)}


def flip_a_bit(path: str) -> None:
    raw = bytearray(Path(path).read_bytes())
    raw[-1] ^= 1
    Path(path).write_bytes(raw)


def test_whole_files_are_let_pass(files: dict[str, FileEntry]):
    check = HashCheck(files, 0, 1)
    check.check()
    check.thread.join()
    check.check()
    check.close()


def test_each_file_is_read_by_one_rank(files: dict[str, FileEntry]):
    for damaged in files:
        before = Path(damaged).read_bytes()
        flip_a_bit(damaged)
        found = []
        for rank in range(3):
            check = HashCheck(files, rank, 3)
            check.thread.join()
            try:
                check.check()
            except InputError as error:
                found.append(str(error))
            check.close()
        assert len(found) == 1
        assert f"{damaged}: sha256 " in found[0]
        assert f"the manifest says {files[damaged].sha256}" in found[0]
        Path(damaged).write_bytes(before)


@pytest.mark.parametrize("damage", [lambda path: os.truncate(path, 5), os.unlink], ids=["truncated", "removed"])
def test_other_damage_is_told_too(files: dict[str, FileEntry], damage):
    path = list(files)[3]
    damage(path)
    check = HashCheck(files, 0, 1)
    check.thread.join()
    for _ in range(2):  # it stays damaged
        with pytest.raises(InputError, match=path):
            check.check()
    check.close()


def test_close_ends_the_thread_promptly(giant: dict[str, FileEntry]):
    check = HashCheck(giant, 0, 1)
    time.sleep(0.05)
    start = time.perf_counter()
    check.close()
    assert time.perf_counter() - start < 5
    assert not [thread for thread in threading.enumerate() if thread.name == "hashes"]
    check.check()


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
def test_the_trainer_goes_first(giant: dict[str, FileEntry]):
    before = os.getpriority(os.PRIO_PROCESS, 0)
    check = HashCheck(giant, 0, 1)
    time.sleep(0.1)
    thread = next(thread for thread in threading.enumerate() if thread.name == "hashes")
    assert os.getpriority(os.PRIO_PROCESS, thread.native_id or 0) == 19
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
    check.close()
