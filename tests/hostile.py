"""What a refusal of hostile input may take: 5 seconds and 200 MB, and nothing is written outside a folder."""

from __future__ import annotations

import ctypes
import inspect
import os
import signal
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import Any

import pytest

SECONDS, KILOBYTES, CASES = 5, 200_000, 250
LONGEST = 60  # seconds, however busy the machine is
# Of each file of tests, as it says itself: so many cases run in `bounded`, one by one.
MEASURED = {
    "test_config_hostile": 112, "test_checkpoint_hostile": 237, "test_checkpoint_limits": 36, "test_data_hostile": 54,
    "test_tokenizer_hostile": 15, "test_train_run_folder_hostile": 80,
}  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# Which argument of an audit event is a path that is made, changed or removed. A link of that name is not followed.
CHANGES = {
    "os.mkdir": 0,
    "os.remove": 0,
    "os.rmdir": 0,
    "os.rename": 1,
    "os.link": 1,
    "os.symlink": 1,
    "os.truncate": 0,
}
CHANGES |= {"os.chmod": 0, "os.chown": 0, "os.utime": 0}

_watching: list[set[str]] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Note in the innermost of `_watching` what Python writes to."""
    if not _watching or event not in ("open", *CHANGES):
        return
    path, follows = arguments[CHANGES.get(event, 0)], False
    if event == "open":
        flags = arguments[2] if isinstance(arguments[2], int) else 0
        if not flags & WRITING:
            return
        follows = not flags & (os.O_NOFOLLOW | os.O_EXCL)
    if isinstance(path, str | bytes | os.PathLike):
        folder, name = os.path.split(os.path.abspath(os.fsdecode(path)))
        real = os.path.join(os.path.realpath(folder), name)
        _watching[-1].add(os.path.realpath(real) if follows else real)


sys.addaudithook(_watch)  # which cannot be taken away again


def _memory(what: str) -> int:
    """VmHWM or VmRSS of this process, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))


def _seconds(children: bool) -> float:
    """Time, without that in which this thread (or any process) waited for a processor: a busy machine is not a hang."""
    if not children:
        return time.monotonic() - int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
    some = Path("/proc/pressure/cpu").read_text().split("\n")[0]
    return time.monotonic() - int(some.rpartition("=")[2]) / 1e6


@contextmanager
def bounded(inside: Path | None = None, *, children: bool = False) -> Iterator[None]:
    """Fail unless the block ends within SECONDS, this process's memory peaks less than KILOBYTES above what it has, and
    nothing is written, by Python, but what lies in the folder `inside` (None: nothing). children: it waits for some.
    """

    def late(*_: object) -> None:
        if max(_seconds(children) - began, time.process_time() - used) >= SECONDS or time.monotonic() - first > LONGEST:
            pytest.fail(f"took more than {SECONDS} s")  # no Exception: what is under test cannot take it for its own
        signal.alarm(1)

    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what an earlier case has left could hide what this one takes
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
    before, written = _memory("VmRSS"), set[str]()
    began, used, first = _seconds(children), time.process_time(), time.monotonic()
    handler = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    _watching.append(written)
    try:
        yield
        late()
    finally:
        _watching.pop()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    grown, own = _memory("VmHWM") - before, os.path.realpath(inside or os.devnull)
    assert grown < KILOBYTES, f"took {grown} kB"
    outside = [path for path in written if path != own and not path.startswith((f"{own}/", "/dev/", "/proc/"))]
    assert not [path for path in outside if "__pycache__" not in path], f"written: {outside}"


def measured(module: str) -> int:
    """How many cases of a file of tests run in `bounded`, each on its own."""
    total = 0
    for name, test in vars(sys.modules[module]).items():
        if name.startswith("test_") and {"bounded", "refused"} & set(inspect.unwrap(test).__code__.co_names):
            marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
            total += prod(len(mark.args[1]) for mark in marks)
    return total


def check_count(module: str) -> None:
    """The file's share of at least CASES."""
    found = measured(module)
    assert found == MEASURED[module], found
    assert sum(MEASURED.values()) >= CASES


@contextmanager
def no_umask() -> Iterator[None]:
    """Files get the modes that they are opened with."""
    before = os.umask(0)
    try:
        yield
    finally:
        os.umask(before)


def open_to_others(folder: Path) -> dict[str, str]:
    """The modes of all that is not its owner's alone: files 0600 and folders 0700, this folder too."""
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.rglob("*"))}
    return {str(path): oct(mode) for path, mode in modes.items() if mode != (0o700 if path.is_dir() else 0o600)}


def contents(folder: Path) -> dict[str, object]:
    """All below a folder: path -> the bytes of a file, the target of a link, or None."""
    found = sorted(folder.rglob("*"))
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else (path.read_bytes() if path.is_file() else None)
        for path in found
    }
