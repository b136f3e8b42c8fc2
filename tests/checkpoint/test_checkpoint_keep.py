"""Housekeeping harms nothing: strangers in the folder stop neither a save nor a resume, and what is kept is kept."""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_helpers import make_tensors, same, save

from llm.checkpoint.manifest import KINDS
from llm.checkpoint.reader import find_latest, open_checkpoint
from llm.checkpoint.writer import checkpoints, step_of
from llm.errors import CheckpointError

OLD, NEW = make_tensors(1), make_tensors(2)
ODD = [
    "notes.txt",
    "step-1",
    "step-000000001",  # another name of step 1
    "step-\u0661\u0661\u0661\u0661\u0661\u0661\u0661\u0661",  # digits, but not ours
    "step-00000009.bak",
    "step-best.tmp",
    "a\nb",
    os.fsdecode(b"\xff\xfe"),
    "n" * 255,
]
OURS = ["latest", "latest.tmp", "step-00000001.old", "step-00000003", "step-00000003.tmp", "step-00000003.old"]
LATER = ["step-00000009", "step-00000009.tmp", "step-00000009.old"]


def file(path: Path) -> None:
    path.write_text("mine")


def folder(path: Path) -> None:
    path.mkdir()
    (path / "inside").write_text("mine")


def link(path: Path) -> None:
    path.symlink_to("nowhere")


def link_to_a_checkpoint(path: Path) -> None:
    path.symlink_to("step-00000001")


def locked(path: Path) -> None:
    path.mkdir(mode=0)


def pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("stray", [file, folder, link, link_to_a_checkpoint, locked, pipe])
def test_a_stray_entry_stops_no_save_and_no_resume(tmp_path: Path, stray: Callable[[Path], None]) -> None:
    start = tmp_path / "start"
    save(start, 1, OLD)
    save(start, 2, OLD)
    for names in (ODD + LATER, *([name] for name in OURS)):
        root = tmp_path / names[0]
        shutil.copytree(start, root)
        for name in names:
            if name == "latest":
                (root / name).unlink()
            stray(root / name)
        assert find_latest(root)[0] == root / "step-00000002", names
        for step in (3, 4):
            assert save(root, step, NEW) == [root / f"step-{step:08d}"], names
            assert find_latest(root) == (root / f"step-{step:08d}", []), names
        assert all(same(open_checkpoint(root / f"step-0000000{step}"), NEW) for step in (3, 4)), names
        lost = {"latest", "latest.tmp"} if stray is file else {"step-00000003.tmp", "step-00000009.tmp"}
        if stray in (file, folder):  # nobody's file is gone, but for what a crash leaves
            kept = [path for path in root.rglob("*") if path.is_file() and path.read_bytes() == b"mine"]
            assert len(kept) == len(set(names) - lost), names


def test_an_odd_name_is_no_checkpoint(tmp_path: Path) -> None:
    for name in ODD:
        (tmp_path / name).mkdir()
    assert checkpoints(tmp_path) == []


def test_only_a_stray_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step-00000009").touch()
    assert find_latest(tmp_path) == (None, [])
    assert save(tmp_path, 1, NEW) == [tmp_path / "step-00000001"]
    assert (tmp_path / "step-00000009").is_file()


def test_what_holds_no_checkpoint_does_not_count(tmp_path: Path) -> None:
    """An empty folder between two good checkpoints takes the place of neither."""
    save(tmp_path, 1, OLD)
    (tmp_path / "step-00000002").mkdir()
    save(tmp_path, 3, NEW)
    assert same(open_checkpoint(tmp_path / "step-00000001"), OLD)


def test_a_damaged_newest_checkpoint_is_put_aside(tmp_path: Path) -> None:
    """The run falls back, and saves the same step or another: nothing of what it left is deleted."""
    for again in (2, 3, 4):
        root = tmp_path / str(again)
        for step in (1, 2, 3):
            save(root, step, OLD, keep_last=9)
        os.truncate(root / "step-00000003/state.json", 1)
        os.truncate(root / "step-00000002/state.json", 1)
        assert find_latest(root)[0] == root / "step-00000001"
        save(root, again, NEW, keep_last=9)
        damaged = {path.name for path in root.iterdir() if path.is_dir() and (path / "state.json").stat().st_size == 1}
        assert {name[:13] for name in damaged} == {"step-00000002", "step-00000003"}
        assert find_latest(root) == (root / f"step-0000000{again}", [])


def test_what_was_put_aside_takes_no_place_of_a_checkpoint(tmp_path: Path) -> None:
    for step in (1, 5, 6, 2, 3):  # back to 1 after 6
        save(tmp_path, step, NEW, keep_last=3)
    assert [step_of(path) for path in checkpoints(tmp_path)] == [3, 2, 1]
    assert sorted(path.name for path in tmp_path.glob("*.aside-*")) == [
        "step-00000005.aside-1",
        "step-00000006.aside-1",
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_is_not_saved(tmp_path: Path, value: float, kind: str) -> None:
    """One number of one rank: all ranks raise, and what was good stays and is named."""
    bad = {key: tensor.clone() for key, tensor in NEW.items()}
    bad["norm.weight", kind][3] = value
    (first, *others) = save(tmp_path, 1, bad, dp=2)
    assert isinstance(first, CheckpointError) and f"there is no checkpoint from before in {tmp_path}" in str(first)
    save(tmp_path, 1, OLD, dp=2)
    for step in (2, 3, 4):
        (first, *others) = save(tmp_path, step, bad, dp=2)
        assert isinstance(first, CheckpointError) and [str(other) for other in others] == [str(first)]
        assert f"step {step} is not saved: rank " in str(first) and f"norm.weight ({kind})" in str(first)
        assert f"the last good checkpoint is {tmp_path / 'step-00000001'}" in str(first)
        assert set(os.listdir(tmp_path)) == {"step-00000001", "latest"}
    assert same(open_checkpoint(tmp_path / "step-00000001"), OLD)


def test_the_largest_numbers_are_finite(tmp_path: Path) -> None:
    most = torch.finfo(torch.float32).max
    for step, value in enumerate((most, -most)):
        tensors = {key: torch.full_like(tensor, value) for key, tensor in NEW.items()}
        assert save(tmp_path, step, tensors) == [tmp_path / f"step-0000000{step}"]


def test_each_nth_is_kept_for_ever(tmp_path: Path) -> None:
    for step in range(2, 22, 2):
        save(tmp_path, step, NEW, keep_last=2, keep_every=6)
    assert [step_of(path) for path in checkpoints(tmp_path)] == [20, 18, 12, 6]
    save(tmp_path, 22, NEW, keep_last=1)
    assert [step_of(path) for path in checkpoints(tmp_path)] == [22]


@pytest.mark.parametrize(("call", "words"), [("rmtree", "cannot be deleted"), ("rename", "cannot be put aside")])
def test_what_cannot_be_cleaned_up_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, words: str
) -> None:
    for step in (1, 2, 3, 9):
        save(tmp_path, step, OLD, keep_last=9)
    module: Any = {"rmtree": shutil, "rename": os}[call]
    real, said = getattr(module, call), list[str]()

    def broken(path: Any, *rest: Any, **options: Any) -> Any:
        if Path(path).name in ("step-00000001.tmp", "step-00000009") and not options.get("ignore_errors"):
            raise OSError(errno.EBUSY, "Device or resource busy")
        return real(path, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, call, broken)
        assert save(tmp_path, 4, NEW, say=said.append) == [tmp_path / "step-00000004"]
    assert any(words in text and "busy" in text for text in said)
    assert same(open_checkpoint(tmp_path / "step-00000004"), NEW)
    assert not any(isinstance(found, CheckpointError) for found in save(tmp_path, 5, NEW))


def test_each_file_that_is_read_or_deleted_is_told(tmp_path: Path) -> None:
    """On a slow disk each may take a second, of thousands: a save that gets on must not look like one that hangs."""
    save(tmp_path, 1, OLD, dp=2)
    deleted = {path.name for path in (tmp_path / "step-00000001").iterdir()}
    (tmp_path / "step-00000009.tmp").mkdir()
    (tmp_path / "step-00000009.tmp/half").write_text("of a crash")
    told: list[str] = []

    def each(items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            told.append(Path(item).name if isinstance(item, str | Path) else "piece")
            yield item

    save(tmp_path, 2, NEW, dp=2, keep_last=1, each=each)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000002", "latest"}
    assert told[0] == "half" and "piece" in told
    assert told.count("rank-00000.json") == told.count("rank-00001.json") == 2  # read, and deleted
    # The size of each shard is asked for, and the old ones, of the same names, are deleted.
    assert {name: told.count(name) for name in deleted} == {
        name: 2 if name.endswith(".safetensors") else 1 for name in deleted
    }
