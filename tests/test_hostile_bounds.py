"""`bounded` itself: it finds what takes long, takes memory or writes elsewhere."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import hostile
import pytest
from hostile import bounded


def linked(folder: Path) -> None:
    (folder / "in/link").symlink_to(folder / "out")
    (folder / "in/link").write_text("")


def moved(folder: Path) -> None:
    (folder / "in/file").write_text("")
    (folder / "in/file").rename(folder / "file")


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "memory": (lambda _: bytearray(250_000_000), "took 2[0-9]{5} kB"),
    "a sleep": (lambda _: time.sleep(20), "took more than 1 s"),
    "a loop": (lambda _: [None for _ in iter(int, 1)], "took more than 1 s"),
    "a pipe": (lambda folder: os.mkfifo(folder / "in/pipe") or (folder / "in/pipe").read_text(), "took more than 1 s"),
    "a file": (lambda folder: (folder / "file").write_text(""), "written"),
    "a folder": (lambda folder: (folder / "folder").mkdir(), "written"),
    "a file behind a link": (linked, "written"),
    "a file moved out": (moved, "written"),
    "a file that goes": (lambda folder: (folder / "old").unlink(), "written"),
    "another mode": (lambda folder: (folder / "old").chmod(0o600), "written"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_not_bounded_is_found(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostile, "SECONDS", 1)
    (tmp_path / "in").mkdir()
    (tmp_path / "old").touch()
    do, words = WRONG[what]
    with pytest.raises((AssertionError, pytest.fail.Exception), match=words), bounded(tmp_path / "in"):
        do(tmp_path)


def test_what_is_bounded_passes(tmp_path: Path) -> None:
    with bounded(tmp_path / "in"):
        (tmp_path / "in").mkdir()
        (tmp_path / "in/file").write_bytes(bytes(50_000_000))
        (tmp_path / "in/file").rename(tmp_path / "in/other")
    with bounded():
        assert (tmp_path / "in/other").stat().st_size == 50_000_000
