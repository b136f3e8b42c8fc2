"""A saving process is killed before each of its file operations, and half-way through each write."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_helpers import make_tensors, pieces_of, same, save
from states import state_of
from thread_ranks import ranks_in_threads

from chosen import slow_but
from llm.checkpoint import writer
from llm.checkpoint.reader import find_latest, open_checkpoint
from llm.checkpoint.writer import checkpoints

OLD, NEW = make_tensors(1), make_tensors(2)
CALLS = ("open", "write", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir")


def killed_at(root: Path, point: int, step: int) -> bool:
    """Save NEW in a process that is killed at its point-th file operation; whether it was."""
    child = os.fork()
    if child == 0:
        count = 0

        def deadly(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(*arguments: Any, **options: Any) -> Any:
                nonlocal count
                count += 1
                if count > point:
                    if name == "write":  # half of it gets through
                        call(arguments[0], arguments[1][: len(arguments[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*arguments, **options)

            return wrapper

        for name in CALLS:
            setattr(os, name, deadly(name, getattr(os, name)))
        with ranks_in_threads(1):
            writer.write_checkpoint(root, step, pieces_of(NEW, 0, 1, 1), state_of(step), keep_last=2)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("step", slow_but([3], [3, 2]), ids=["next step", "same step again"])
def test_killed_anywhere_the_old_or_the_new_one_is_found(tmp_path: Path, step: int) -> None:
    start = tmp_path / "start"
    save(start, 1, OLD)
    save(start, 2, OLD)
    seen, point = [], 0
    while True:
        root = tmp_path / f"killed-{point}"
        shutil.copytree(start, root)
        killed = killed_at(root, point, step)
        folder, warnings = find_latest(root)
        assert warnings == []
        assert folder is not None
        reader = open_checkpoint(folder)
        seen.append(same(reader, NEW))
        assert seen[-1] or same(reader, OLD)
        assert len(checkpoints(root)) >= 2  # keep_last holds all the time
        if not killed:
            break
        if point % 5 == 0:  # and the run goes on as if nothing had been
            assert save(root, 4, NEW) == [root / "step-00000004"]
            assert not [name for name in os.listdir(root) if name.endswith((".tmp", ".old"))]
            assert find_latest(root) == (root / "step-00000004", [])
        point += 1
    assert seen == sorted(seen)
    assert not seen[0]
    assert seen[-1]
    assert 15 < seen.count(False) < len(seen) - 5
