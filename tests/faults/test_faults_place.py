"""What is around a run changes: the port is taken, the clock jumps, folders of logs vanish."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Callable

import pytest

from pool import free_port
from runs import DEEPSPEED, ROOT, TORCHRUN, Workspace
from test_faults_stop import SETTINGS, log, validation

Row = Callable[..., None]
LAUNCH = {"torchrun": [*TORCHRUN, "--nproc_per_node", "2"], "deepspeed": [*DEEPSPEED, "--num_gpus", "2"]}


def on_port(
    space: Workspace, launcher: str, port: int, name: str, script: str = "launch/pretrain.py", pace: float = 0
) -> list[str]:
    arguments = [str(ROOT / script), *space.arguments(**SETTINGS, name=name)]
    return ["env", f"FAULT={pace}", *LAUNCH[launcher], "--master_port", str(port), *arguments]


def refused(space: Workspace, start: list[str]) -> float:
    begin = time.monotonic()
    done = space.run(start)
    seconds, text = time.monotonic() - begin, (done.stdout + done.stderr).lower()
    assert done.returncode != 0 and ("in use" in text or "listens on" in text), text[-3000:]
    assert seconds < 90  # DeepSpeed waits 30 s for the other rank, which SIGTERM does not end before the ranks have met
    return seconds


@pytest.mark.slow
@pytest.mark.row(29)
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_port_that_is_taken(launcher: str, workspace: Workspace, row: Row) -> None:
    name = f"port-{launcher}"
    with socket.create_server(("127.0.0.1", 0)) as other:
        row(29, launcher, detected=refused(workspace, on_port(workspace, launcher, other.getsockname()[1], name)))
    assert not (workspace.path / "runs" / name).exists()


@pytest.mark.slow
@pytest.mark.row(29)
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_job_joins_no_other(launcher: str, whole: dict[str, str], workspace: Workspace, row: Row) -> None:
    """Another run, on the port of one that trains: that goes on as if nothing had happened."""
    space, first, second = workspace, f"first-{launcher}", f"second-{launcher}"
    port = free_port()
    process = space.start(on_port(space, launcher, port, first, "tests/faults/paced.py", 0.3))
    space.wait_for_step(first, 5)
    row(29, launcher, detected=refused(space, on_port(space, launcher, port, second)))
    assert process.poll() is None
    assert process.wait(timeout=200) == 0, log(space)
    assert space.losses(first) == space.losses(whole[launcher])
    assert not (space.path / "runs" / second).exists()


@pytest.mark.slow
@pytest.mark.row(32)
@pytest.mark.parametrize("launcher", ["python", "torchrun"])
def test_the_clock_jumps_and_logs_vanish(launcher: str, whole: dict[str, str], workspace: Workspace, row: Row) -> None:
    space, name = workspace, f"odd-{launcher}"
    settings = SETTINGS | dict(logging__tensorboard="true", train__max_minutes=30)
    process = space.start(space.faulty(launcher, "odd_clock", name=name, **settings))
    space.wait_for_step(name, 20)
    shutil.rmtree(space.path / "runs" / name / "tensorboard")
    assert process.wait(timeout=120) == 0, log(space)
    assert "fault: the clock has jumped" in (space.path / "started.log").read_text()
    assert space.losses(name) == space.losses(whole[launcher])
    assert validation(space, name) == validation(space, whole[launcher])
    row(32, launcher)
