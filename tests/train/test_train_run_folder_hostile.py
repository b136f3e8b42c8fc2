"""A run writes below its own folder alone, whatever lies there, and its files are its owner's whatever the umask."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hostile import bounded, check_count, contents, no_umask, open_to_others

from llm import files
from llm.cluster.failure import record_failure
from llm.cluster.heartbeat import Heartbeat, Verdict
from llm.cluster.supervise import Command, End, Supervisor
from llm.errors import InputError
from llm.train.engines.deepspeed_log import divert
from llm.train.metrics import MetricsWriter
from llm.train.profiling import empty_folder
from llm.train.run_folder import RunFolder
from runs import ROOT, Workspace

FILES = (
    "config.yaml", "metrics.jsonl", "tokenizer.json", "tokenizer_config.json", "kernels.json", "stopped.json",
    "failed.json", "restarts.jsonl", "nonce", "lock", "profile", "wandb_id",
)  # fmt: skip
FOLDERS = ("tensorboard", "deepspeed", "stalls", "wandb", "profile-3-5")
KINDS: dict[str, Callable[[Path, Path], None]] = {
    "link": lambda path, target: path.symlink_to(target),
    "link to nothing": lambda path, target: path.symlink_to(target.with_name("new")),
    "pipe": lambda path, target: os.mkfifo(path),
}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """Of a run beside a victim's file and folder."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_text("a victim's")
    (tmp_path / "outside/folder").mkdir()
    folder = RunFolder(tmp_path / "runs", "mine")
    folder.create()
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_a_start_refuses_what_leads_elsewhere(name: str, kind: str, folder: RunFolder, tmp_path: Path) -> None:
    target = tmp_path / ("outside/folder" if name in FOLDERS else "outside/file")
    KINDS[kind](folder.path / name, target)
    before = contents(tmp_path)
    with (
        bounded(folder.path),
        pytest.raises(InputError, match=f"{name} is {'no regular file' if kind == 'pipe' else 'a link'}"),
    ):
        folder.claim()
    assert contents(tmp_path) == before


def test_checkpoints_may_be_a_link(folder: RunFolder, tmp_path: Path) -> None:
    folder.checkpoints.symlink_to(tmp_path / "outside/folder")
    folder.claim().release()


def metrics(folder: RunFolder) -> None:
    with MetricsWriter(folder.metrics, None, say=lambda text: None) as writer:
        writer.write({"step": 1})


def supervised(folder: RunFolder) -> None:
    supervisor = Supervisor(Command([]), folder, None, restarts=0, wait=0, host_wait=0)
    supervisor._write(0, End(0, "finished"), 0)


WRITERS: dict[str, Callable[[RunFolder], object]] = {
    "metrics.jsonl": metrics,
    "nonce": RunFolder.share_nonce,
    "lock": RunFolder.lock,
    "failed.json": lambda folder: record_failure(folder.failed, 1, "", rank=0),
    "restarts.jsonl": supervised,
    "config.yaml": lambda folder: files.replace(folder.config, b"x"),
    "config.yaml.tmp": lambda folder: files.replace(folder.config, b"x"),
    "deepspeed/rank-0.log": lambda folder: divert(folder.path / "deepspeed/rank-0.log"),
    "stalls/rank-0.txt": lambda folder: files.open_own(folder.path / "stalls/rank-0.txt", "w"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WRITERS)
def test_no_write_follows_a_link_that_came_later(name: str, kind: str, folder: RunFolder, tmp_path: Path) -> None:
    path = folder.path / name
    path.parent.mkdir(exist_ok=True)
    KINDS[kind](path, tmp_path / "outside/file")
    with bounded(folder.path), suppress(OSError, InputError):
        WRITERS[name](folder)
    assert contents(tmp_path / "outside") == {"file": b"a victim's", "folder": None}


@pytest.mark.parametrize("kind", ["link to zeros", "pipe"])
def test_the_nonce_is_not_waited_for(kind: str, folder: RunFolder) -> None:
    if kind == "pipe":
        os.mkfifo(folder.path / "nonce")
    else:
        (folder.path / "nonce").symlink_to("/dev/zero")
    with bounded(), pytest.raises(InputError, match="is not a regular file"):
        folder.check_nonce("x")


def stalled(folder: RunFolder) -> None:
    Heartbeat(failed=folder.failed)._record(Verdict(1, "stalls", 0, "here"))


MAKERS = {name: write for name, write in WRITERS.items() if name not in ("lock", "stalls/rank-0.txt")}
MAKERS |= {"stalls/rank-0.txt": stalled, "profile-3-5": lambda folder: empty_folder(folder.path / "profile-3-5")}


@pytest.mark.parametrize("name", MAKERS)
def test_each_file_is_made_for_its_owner(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what writes it: a library, which does not, is what launch/pretrain.py changes the umask for."""
    monkeypatch.delenv("INGOT_START", raising=False)
    folder = RunFolder(tmp_path, "mine")
    with no_umask():
        folder.create()
        MAKERS[name](folder)
    assert open_to_others(folder.path) == {} and len(contents(folder.path)) > 0


def test_files_of_a_run_are_its_owners_whatever_the_umask(tmp_path: Path) -> None:
    space = Workspace(tmp_path / "space")
    settings = {"train.max_steps": 2, "train.eval_interval": 2, "logging.tensorboard": "true", "name": "mine"}
    words = [sys.executable, str(ROOT / "launch/pretrain.py"), *space.arguments(**settings), "--prepare"]
    done = space.run(["sh", "-c", 'umask 0; exec "$@"', "sh", *words])
    assert done.returncode == 0, done.stderr
    found = (space.path / "runs/mine").rglob("*")
    assert open_to_others(space.path / "runs/mine") == open_to_others(space.path / "data") == {}
    kinds = {"config.yaml", "metrics.jsonl", "tokenizer.json", "lock", "nonce", "manifest.json", "state.json"}
    assert {path.name for path in found} > kinds | {"tensorboard", "checkpoints", "loss.png"}


def test_the_cases_are_counted() -> None:
    check_count(__name__)
