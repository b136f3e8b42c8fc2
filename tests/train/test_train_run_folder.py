"""One job per run folder, seen by all of its nodes; metrics never run ahead of the checkpoint."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from llm.config import RunConfig
from llm.errors import InputError
from llm.train import run_folder
from llm.train.run_folder import RunFolder, truncate_metrics

HOLDER = """
import sys, time
from pathlib import Path
from llm.train.run_folder import RunFolder
folder = RunFolder(Path(sys.argv[1]), "a-run")
folder.create()
lock = folder.lock()
print("locked", flush=True)
time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path, "a-run")
    folder.create()
    return folder


def hold(tmp_path: Path, seconds: float) -> subprocess.Popen[str]:
    """A process that holds the lock of a-run."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path), str(seconds)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/a", "-x", ".x", "a b", "a\n", "é"])
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="name is"):
        RunConfig(name=name)


def test_paths(folder: RunFolder, tmp_path: Path) -> None:
    run = tmp_path / "a-run"
    assert folder.path == run
    assert folder.path.is_dir()
    assert folder.config == run / "config.yaml"
    assert folder.metrics == run / "metrics.jsonl"
    assert folder.checkpoints == run / "checkpoints"
    assert folder.tensorboard == run / "tensorboard"
    folder.create()


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "a-run").touch()
    with pytest.raises(InputError, match="cannot be made"):
        RunFolder(tmp_path, "a-run").create()


def test_a_second_run_is_refused_until_the_first_is_killed(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "LOCK_PATIENCE_SECONDS", 0.2)
    (folder.path / "lock").write_text("a longer record of an earlier run " * 9)
    process = hold(tmp_path, 60)
    try:
        words = f"in use by process {process.pid} on {socket.gethostname()} since 20"
        with pytest.raises(InputError, match=words):
            folder.lock()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    lock = folder.lock()
    assert json.loads((folder.path / "lock").read_text())["pid"] == os.getpid()
    lock.release()
    folder.lock().release()


def test_a_run_that_is_ending_is_waited_for(folder: RunFolder, tmp_path: Path) -> None:
    process = hold(tmp_path, 0.5)
    folder.lock().release()
    assert process.wait() == 0


def test_a_lock_without_a_record(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "LOCK_PATIENCE_SECONDS", 0.1)
    lock = folder.lock()
    os.truncate(lock.lock_file, 3)
    with pytest.raises(InputError, match="has not yet said"):
        folder.lock()
    lock.release()


def test_a_node_with_another_folder_is_refused(folder: RunFolder, tmp_path: Path) -> None:
    other = RunFolder(tmp_path / "local", "a-run")
    other.create()
    first = folder.share_nonce()
    folder.check_nonce(first)
    with pytest.raises(InputError, match=r"local/a-run holds nothing \(No such file.*all nodes share"):
        other.check_nonce(first)
    second = folder.share_nonce()
    assert second != first
    folder.check_nonce(second)
    with pytest.raises(InputError, match=f"holds {second}, expected {first}"):
        folder.check_nonce(first)


def test_metrics_end_at_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1 / (step + 1)}) for step in (1, 2, 2, 3, 4)]
    path.write_text("\n".join(lines) + '\n{"step": 1, "lo')
    assert truncate_metrics(path, 2) == 3
    assert path.read_text().splitlines() == lines[:3]
    assert path.read_text().endswith("\n")
    assert truncate_metrics(path, 2) == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("line", [b"\0\0\0\0", b"{", b"[]", b"1", b'{"loss": 1}', b'{"step": "x"}'])
def test_lines_that_say_no_step_are_dropped(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b"\n")
    assert truncate_metrics(path, 9) == 1
    assert path.read_bytes() == b'{"step": 1}\n'


def test_a_whole_last_line_without_its_end_is_torn(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 12}')  # it may have been 120
    assert truncate_metrics(path, 50) == 1


def test_no_metrics_yet(tmp_path: Path) -> None:
    assert truncate_metrics(tmp_path / "metrics.jsonl", 5) == 0


def test_a_crash_while_truncating_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    text = '{"step": 1}\n{"step": 2}\n'
    path.write_text(text)

    class Killed(BaseException):
        pass

    def killed(*arguments: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(Killed):
            truncate_metrics(path, 1)
    assert path.read_text() == text
    assert truncate_metrics(path, 1) == 1  # over what the crash left
    assert path.read_text() == '{"step": 1}\n'
