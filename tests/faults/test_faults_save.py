"""Saves that are killed, or whose disk fails: the checkpoint before stays, and the run goes on from it exactly."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from small_disk import resize, small_disk

from chosen import slow_but
from runs import Workspace
from test_faults_stop import SETTINGS, checkpoints, command, goes_on, log

Row = Callable[..., None]


def told(space: Workspace) -> str:
    """All of it: `log` is the end."""
    return (space.path / "started.log").read_text()


def fired(space: Workspace) -> int:
    """How many of its calls have told the fault."""
    return told(space).count("fault: ")


def faulted(space: Workspace, name: str, launcher: str, fault: str) -> tuple[int, float]:
    """Start a run on a disk with this fault: its exit code, and the seconds from the fault to its end."""
    process = space.start(space.faulty(launcher, "faulty_disk", fault, name=name, **SETTINGS))
    deadline = time.monotonic() + 120
    while not fired(space):
        assert time.monotonic() < deadline and process.poll() is None, log(space)
        time.sleep(0.01)
    then = time.monotonic()
    return process.wait(timeout=60), time.monotonic() - then


# Before which of its files of a save a rank is killed: rank 0 has four, of which it writes two when all have written.
IN_A_SAVE = [
    *(("python", f"0 open step-00000200.tmp/ {k} KILL") for k in (1, 2, 3, 4)),
    ("torchrun", "1 open step-00000200.tmp/ 1 KILL"),
    ("torchrun", "0 open step-00000200.tmp/ 3 KILL"),
    ("deepspeed", "1 open step-00000200.tmp/ 1 KILL"),
]


@pytest.mark.row(2)
@pytest.mark.parametrize("case", slow_but([], IN_A_SAVE), ids="-".join)
def test_a_rank_is_killed_in_a_save(
    case: tuple[str, str], whole: dict[str, str], workspace: Workspace, row: Row
) -> None:
    launcher, fault = case
    name = "-".join(["in-a-save", launcher, *fault.split()[0:4:3]])
    code, detected = faulted(workspace, name, launcher, fault)
    assert code != 0 and fired(workspace) == 1
    assert checkpoints(workspace, name) == ["step-00000100", "step-00000200.tmp"]
    again = goes_on(workspace, name, whole[launcher], command(workspace, launcher, name=name))
    assert again.step == 100 and checkpoints(workspace, name) == ["step-00000200", "step-00000300"]
    row(2, launcher, detected=detected, lost=200 - again.step, restart=again.seconds)


@pytest.mark.slow
@pytest.mark.row(3)
@pytest.mark.parametrize("launcher", ["python", "torchrun"])
def test_rank_0_is_killed_before_it_points_to_the_checkpoint(
    launcher: str, whole: dict[str, str], workspace: Workspace, row: Row
) -> None:
    name = f"unpointed-{launcher}"
    code, detected = faulted(workspace, name, launcher, "0 replace checkpoints/latest.tmp 2 KILL")
    assert code != 0
    assert (workspace.path / "runs" / name / "checkpoints/latest").read_text() == "step-00000100\n"
    again = goes_on(workspace, name, whole[launcher], command(workspace, launcher, name=name))
    assert again.step == 200
    row(3, launcher, detected=detected, lost=200 - again.step, restart=again.seconds)


BROKEN = [
    ("python", "0 write step-00000200.tmp/ 1 EIO"),
    ("python", "0 mkdir step-00000200.tmp 1 EROFS"),
    ("torchrun", "1 fsync step-00000200.tmp/ 1 EIO"),
    ("deepspeed", "1 open step-00000200.tmp/ 1 EROFS"),
]


@pytest.mark.slow
@pytest.mark.row(11)
@pytest.mark.parametrize("case", BROKEN, ids="-".join)
def test_a_disk_that_fails_stops_all_ranks(
    case: tuple[str, str], whole: dict[str, str], workspace: Workspace, row: Row
) -> None:
    launcher, fault = case
    name = "broken-" + "-".join([launcher, *fault.split()[1::3]])
    code, detected = faulted(workspace, name, launcher, fault)
    reason = os.strerror(getattr(errno, fault.split()[-1]))
    assert code == 1 and told(workspace).count("error: saving failed: OSError: ") == 1, log(workspace)
    assert reason in told(workspace)
    assert checkpoints(workspace, name) == ["step-00000100"]
    again = goes_on(workspace, name, whole[launcher], command(workspace, launcher, name=name))
    row(11, launcher, detected=detected, lost=200 - again.step, restart=again.seconds)


@pytest.fixture
def full_disk(request: pytest.FixtureRequest, workspace: Workspace) -> Iterator[Path]:
    """A disk of 1,000 KiB, which two checkpoints nearly fill, for those of the run disk-<launcher>."""
    folder = workspace.path / "runs" / f"disk-{request.node.callspec.params['launcher']}" / "checkpoints"
    folder.mkdir(parents=True)
    with small_disk(folder, "1000k"):
        yield folder


@pytest.mark.slow
@pytest.mark.row(10)
@pytest.mark.parametrize("launcher", ["python", "torchrun"])
def test_a_full_disk_is_made_larger(
    launcher: str, full_disk: Path, whole: dict[str, str], workspace: Workspace, row: Row
) -> None:
    space, name = workspace, f"disk-{launcher}"
    start = command(space, launcher, name=name, checkpoint__keep_last=9, checkpoint__interval=50)
    process = space.start(start)
    space.wait_for_step(name, 145)
    near = time.monotonic()
    assert process.wait(timeout=60) == 1, log(space)
    detected = time.monotonic() - near
    assert f"the disk is full: runs/{name}/checkpoints" in told(space), log(space)
    assert checkpoints(space, name) == ["step-00000050", "step-00000100"]
    resize(full_disk, "20m")
    again = goes_on(space, name, whole[launcher], start)
    assert again.step == 100
    row(10, launcher, detected=detected, lost=150 - again.step, restart=again.seconds)
