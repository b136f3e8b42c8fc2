"""Faults while a checkpoint is written beside the steps: it is whole or none, and nothing is lost before it."""

from __future__ import annotations

import signal
import subprocess
import time

import psutil
import pytest

from pool import free_port
from runs import TORCHRUN, Workspace, succeeded
from test_faults_stop import SETTINGS, SLOW_DISK, checkpoints, command, log, stopped

BESIDE = SETTINGS | {"checkpoint__interval": 30, "checkpoint__asynchronous": "true", "checkpoint__keep_last": 9}
FIRST, SECOND = "step-00000030", "step-00000060"


@pytest.fixture(scope="session")
def alone(workspace: Workspace) -> str:
    """A run of one rank that nothing disturbed."""
    succeeded(workspace.run(command(workspace, "python", name="undisturbed")))
    return "undisturbed"


def in_the_second_save(space: Workspace, name: str, launcher: list[str], disk: str) -> subprocess.Popen[bytes]:
    """A run that trains on while its second save is under way."""
    start = ["env", "SLOW_FROM=60", disk, *launcher, *SLOW_DISK[1:], *space.arguments(**BESIDE, name=name)]
    process = space.start(start)
    space.wait_for_step(name, 65)
    assert process.poll() is None, log(space)
    return process


def goes_on_from(space: Workspace, name: str, step: int, whole: str) -> None:
    done = space.run(command(space, "python", name=name))
    succeeded(done)
    assert f"resumed from step {step} of" in done.stdout
    assert space.losses(name) == space.losses(whole)


@pytest.mark.slow
def test_a_run_killed_in_a_save_goes_on_from_the_one_before(alone: str, workspace: Workspace) -> None:
    launcher = [*TORCHRUN, "--nproc_per_node", "2", "--master_port", str(free_port())]
    process = in_the_second_save(workspace, "killed-beside", launcher, "SLOW_SECONDS=60")
    family = psutil.Process(process.pid).children(recursive=True)
    for each in family:
        each.kill()
    process.kill()
    process.wait(timeout=30)
    assert not psutil.wait_procs(family, timeout=20)[1]
    assert checkpoints(workspace, "killed-beside") == [FIRST, f"{SECOND}.tmp"]
    launcher[-1] = str(free_port())
    again = [*launcher, *SLOW_DISK[1:], *workspace.arguments(**BESIDE, name="killed-beside")]
    done = workspace.run(again)
    succeeded(done)
    assert "resumed from step 30 of" in done.stdout
    assert not [name for name in checkpoints(workspace, "killed-beside") if name.endswith(".tmp")]
    succeeded(workspace.run([*again[:-1], "--name=whole-beside"]))
    assert workspace.losses("killed-beside") == workspace.losses("whole-beside")


@pytest.mark.slow
def test_a_run_stopped_in_a_save_finishes_it(alone: str, workspace: Workspace) -> None:
    process = in_the_second_save(workspace, "stopped-beside", SLOW_DISK[:1], "SLOW_SECONDS=2")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75, log(workspace)
    last = stopped(workspace, "stopped-beside")["step"]
    assert checkpoints(workspace, "stopped-beside") == [FIRST, SECOND, f"step-{last:08}"]
    said = log(workspace)
    assert said.index(f"saved runs/stopped-beside/checkpoints/step-{last:08}") < said.index("stopped by SIGTERM")
    goes_on_from(workspace, "stopped-beside", last, alone)


@pytest.mark.slow
def test_a_disk_full_in_a_save_ends_the_run_at_the_next_step(alone: str, workspace: Workspace) -> None:
    start = ["env", "SLOW_FROM=60", "SLOW_FULL=1", *SLOW_DISK, *workspace.arguments(**BESIDE, name="full-beside")]
    began = time.monotonic()
    done = workspace.run(start)
    assert done.returncode == 1 and time.monotonic() - began < 120
    assert "error: the disk is full: runs/full-beside/checkpoints/step-00000060.tmp/" in done.stderr
    assert "Traceback" not in done.stderr
    assert checkpoints(workspace, "full-beside") == [FIRST]
    assert 60 <= len(workspace.losses("full-beside")) < 90, "not before the next save"
    goes_on_from(workspace, "full-beside", 30, alone)
