"""One process at a time, which is named to those who wait, and no trace of one that was killed."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from llm.errors import InputError
from llm.locks import lock

ROOT = Path(__file__).parents[1]
HOLD = """
held = lock(path)
print("held", flush=True)
sys.stdin.read()
"""
# The child keeps what a fork hands down, while its parent is killed.
HOLD_AND_FORK = """
held = lock(path)
if os.fork() == 0:
    print("held", flush=True)
sys.stdin.read()
"""
# A counter that two processes lose counts of, unless one reads and writes it at a time.
COUNT = """
counter = path.with_name("counter")
print("ready", flush=True)
sys.stdin.readline()
for _ in range(20):
    held = lock(path)
    found = int(counter.read_text())
    counter.write_text(str(found + 1))
    held.release()
"""


def start(program: str, path: Path) -> subprocess.Popen[str]:
    """A process that runs `program`, once it has printed a line."""
    code = f"import os, sys\nfrom pathlib import Path\nfrom llm.locks import lock\npath = Path(sys.argv[1])\n{program}"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


@pytest.mark.parametrize("program", [HOLD, HOLD_AND_FORK], ids=["alone", "with a child"])
def test_the_holder_is_named_and_killing_it_frees_the_lock(tmp_path: Path, program: str) -> None:
    path = tmp_path / "lock"
    process = start(program, path)
    try:
        words = f"{tmp_path} is in use by process {process.pid} on {socket.gethostname()} since 20"
        with pytest.raises(InputError, match=f"^{re.escape(words)}.*; stop it$"):
            lock(path, 0.1, "stop it")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    lock(path, 5).release()
    process.communicate()


def test_one_that_waits_goes_on_when_the_holder_is_killed(tmp_path: Path) -> None:
    holder = start(HOLD, tmp_path / "lock")
    waits = start("print('waits', flush=True)\nlock(path)", tmp_path / "lock")
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            waits.wait(1)
        holder.kill()
        assert waits.wait(30) == 0
    finally:
        for process in (holder, waits):
            process.kill()
            process.communicate()


def test_processes_that_race_take_turns(tmp_path: Path) -> None:
    (tmp_path / "counter").write_text("0")
    processes = [start(COUNT, tmp_path / "lock") for _ in range(2)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    assert (tmp_path / "counter").read_text() == "40"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(InputError, match=f"lock cannot be locked: .*{os.strerror(number)}"):
        lock(tmp_path / "lock")


def test_what_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("kept")
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    for path in (tmp_path / "lock", tmp_path, tmp_path / "elsewhere" / "lock"):
        with pytest.raises(InputError, match="cannot be locked"):
            lock(path, 1)
    assert (tmp_path / "elsewhere").read_text() == "kept"
