"""A disk or a network that fails for a while is no damage: a read is tried again, and a good checkpoint stays good."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from checkpoint_helpers import make_tensors, same, save
from thread_ranks import on_thread_ranks

from llm import files
from llm.checkpoint import reader
from llm.checkpoint.reader import find_latest, find_named, open_agreed, open_checkpoint
from llm.errors import InputError, ReadError
from llm.train.resume import find_step

OLD, NEW = make_tensors(1), make_tensors(2)
PASSING = [errno.ESTALE, errno.EIO, errno.EINTR, errno.EAGAIN, errno.ETIMEDOUT, errno.ENOTCONN]
SHARD, STATE, MANIFEST = (
    f"step-00000002/{name}" for name in ("rank-00000-00000.safetensors", "state.json", "manifest.json")
)
# What the reader calls, on what: the file or folder that a failing disk holds.
CALLS = {
    "list": ("scandir", ""),
    "list one": ("listdir", "step-00000002"),
    "stat": ("lstat", SHARD),
    "stat the manifest": ("lstat", MANIFEST),
    "read the manifest": ("open", MANIFEST),
    "hash a shard": ("open", SHARD),
    "hash the state": ("open", STATE),
    "map a shard": ("safe_open", SHARD),
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Checkpoints of steps 1 (OLD) and 2 (NEW)."""
    monkeypatch.setattr(files, "WAITS", (0.0, 0.0, 0.0))
    save(tmp_path, 1, OLD)
    save(tmp_path, 2, NEW)
    return tmp_path


@contextmanager
def failing(call: str, path: Path, number: int, times: int) -> Iterator[list[int]]:
    """`call` on `path` raises OSError(number) so many times; how often it did."""
    fired: list[int] = []
    modules = {"safe_open": (reader, "safe_open")}
    module, name = modules.get(call, (os, "listdir" if call == "scandir" else call))
    real = getattr(module, name)

    def broken(first: Any = ".", *rest: Any, **options: Any) -> Any:
        if not isinstance(first, int) and Path(first) == path and len(fired) < times:
            fired.append(number)
            raise OSError(number, os.strerror(number))
        return real(first, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, broken)
        yield fired


def read_all(root: Path) -> bool:
    found, warnings = find_latest(root)
    assert found == root / "step-00000002" and warnings == []
    return same(open_checkpoint(found), NEW)


@pytest.mark.parametrize("number", PASSING, ids=errno.errorcode.get)
@pytest.mark.parametrize("what", CALLS)
def test_a_read_that_fails_for_a_while_is_tried_again(root: Path, what: str, number: int) -> None:
    call, path = CALLS[what]
    with failing(call, root / path, number, times=len(files.WAITS)) as fired:
        assert read_all(root)
    assert len(fired) == len(files.WAITS)


@pytest.mark.parametrize("what", [what for what in CALLS if what != "map a shard"])
def test_one_that_goes_on_failing_is_not_damage(root: Path, what: str) -> None:
    """No older checkpoint is taken, the run ends with 1 and may be started again, and then nothing is lost."""
    call, path = CALLS[what]
    with failing(call, root / path, errno.EIO, times=1000) as fired:
        with pytest.raises(ReadError, match=r"in 4 attempts: Input/output error; it may be whole"):
            find_latest(root)
        assert len(fired) == 4
        for resume_step in (1, 2) if path in (MANIFEST, STATE) else ():
            with pytest.raises(ReadError):
                find_step(root, resume_step)
        if path:
            with pytest.raises(ReadError):
                find_named(root / "step-00000002")
            (result, other) = on_thread_ranks(2, lambda rank: open_agreed(root))
            assert type(result) is type(other) is ReadError and str(result) == str(other)
            assert "start again; if it stays so, move" in str(result)
    assert read_all(root)


def test_it_waits_between_attempts(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(files, "WAITS", (0.1, 0.5))
    monkeypatch.setattr(files.time, "sleep", waited.append)
    with failing("lstat", root / SHARD, errno.ESTALE, times=2):
        assert read_all(root)
    assert waited == [0.1, 0.5]


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ELOOP], ids=errno.errorcode.get)
def test_what_is_not_there_is_damage_at_once(root: Path, number: int) -> None:
    with failing("lstat", root / SHARD, number, times=1000) as fired:
        found, (warning,) = find_latest(root)
    assert found == root / "step-00000001" and os.strerror(number) in warning
    assert len(fired) == 1


def test_a_good_one_is_not_put_aside_for_a_read_error(root: Path) -> None:
    """As a save does with what comes after it: the run must not have gone on from the one before."""
    with failing("open", root / SHARD, errno.EIO, times=1000), pytest.raises(ReadError):
        find_latest(root)
    save(root, 3, NEW)
    assert not list(root.glob("*.aside-*"))


def test_a_rank_that_cannot_read_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only rank 1's mount fails, after rank 0 has found the checkpoint."""
    opened = reader.open_checkpoint

    def broken(folder: Path, sha256: str | None = None) -> Any:
        if reader.dist.get_rank() == 1:
            raise ReadError("the manifest could not be read: Stale file handle")
        return opened(folder, sha256)

    monkeypatch.setattr(reader, "open_checkpoint", broken)
    results = on_thread_ranks(2, lambda rank: open_agreed(root))
    assert {type(result) for result in results} == {ReadError} and len(set(map(str, results))) == 1
    assert "rank 1: " in str(results[0]) and "Stale file handle" in str(results[0])


def test_all_damaged_still_refuses(root: Path) -> None:
    for step in (1, 2):
        os.truncate(root / f"step-0000000{step}/state.json", 1)
    with pytest.raises(InputError, match="move the folder away"):
        find_latest(root)
