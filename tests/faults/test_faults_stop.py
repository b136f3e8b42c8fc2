"""Runs that are asked to stop: they save, end with exit code 75, and the same command loses no step and no bit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from pool import free_port
from runs import ROOT, TORCHRUN, Resumed, Workspace, succeeded

TERM, INT, USR1, KILL = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGKILL
SETTINGS = dict(train__engine="plain", train__max_steps=300, train__eval_interval=100, checkpoint__interval=100)
SLOW_DISK = [sys.executable, str(ROOT / "tests/faults/slow_disk.py")]
# Launcher, who is told, the signal. A `script` hands it on to the ranks, the `launcher` below it does as it will.
TOLD = [
    *(("python", "rank", number) for number in (TERM, INT, USR1)),
    *(("torchrun", who, number) for who in ("rank", "launcher", "script") for number in (TERM, INT, USR1)),
    *(("deepspeed", who, number) for who in ("rank", "launcher", "script") for number in (TERM, INT, USR1)),
    *((launcher, "launcher", KILL) for launcher in ("torchrun", "deepspeed")),
]


def command(space: Workspace, launcher: str, **overrides: Any) -> list[str]:
    start = [sys.executable, ROOT / "launch/pretrain.py"]
    if launcher != "python":
        start = ["env", f"MASTER_PORT={free_port()}", "RANKS=2", ROOT / f"launch/{launcher}.sh"]
    return [*map(str, start), *space.arguments(**SETTINGS | overrides)]


def ranks_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    return [each for each in family if "launch/pretrain.py" in " ".join(each.cmdline()) and not each.children()]


def stopped(space: Workspace, name: str) -> dict[str, Any]:
    return json.loads((space.path / "runs" / name / "stopped.json").read_text())


def checkpoints(space: Workspace, name: str) -> list[str]:
    return sorted(path.name for path in (space.path / "runs" / name / "checkpoints").glob("step-*"))


def log(space: Workspace) -> str:
    return (space.path / "started.log").read_text()[-3000:]


def validation(space: Workspace, name: str) -> list[float]:
    return [record["val_loss"] for record in space.metrics(name) if "val_loss" in record]


def goes_on(space: Workspace, name: str, whole: str, again: list[str]) -> Resumed:
    """The same command ends as the whole run did."""
    resumed = space.resume(again)
    assert space.losses(name) == space.losses(whole)
    assert validation(space, name) == validation(space, whole)
    assert not (space.path / "runs" / name / "stopped.json").exists()
    return resumed


@pytest.mark.slow
@pytest.mark.row(7, 9)
@pytest.mark.parametrize("told", TOLD, ids=lambda told: f"{told[0]}-{told[1]}-{told[2].name}")
def test_a_stopped_run_loses_nothing(
    told: tuple[str, str, int], whole: dict[str, str], workspace: Workspace, row: Callable[..., None]
) -> None:
    space, (launcher, who, number) = workspace, told
    name = f"{launcher}-{who}-{number}"
    start = command(space, launcher, name=name)
    process = space.start(start)
    space.wait_for_step(name, 20)
    ranks = ranks_of(process)
    assert len(ranks) == (1 if launcher == "python" else 2)
    script = psutil.Process(process.pid)
    {"rank": ranks[-1], "script": script, "launcher": (script.children() or [script])[0]}[who].send_signal(number)
    signalled = time.monotonic()
    assert process.wait(timeout=60) == 75, log(space)
    detected = time.monotonic() - signalled
    assert not psutil.wait_procs(ranks, timeout=5)[1], "ranks outlive their launcher"
    told_of = stopped(space, name)
    last = len(space.losses(name))
    assert told_of["step"] == last < 300, "the run was over before the signal"
    assert number == KILL or who == "launcher" or told_of["reason"] == signal.Signals(number).name
    assert checkpoints(space, name)[-1] == f"step-{last:08}"
    assert log(space).count("stopped by") == 1
    assert who == "launcher" or "Traceback" not in log(space)
    again = goes_on(space, name, whole[launcher], start)
    if number != KILL:
        row(9 if number == INT else 7, launcher, detected=detected, lost=last - again.step, restart=again.seconds)


@pytest.mark.slow
@pytest.mark.row(9)
def test_doubled_signals_are_one_stop(whole: dict[str, str], workspace: Workspace) -> None:
    start = command(workspace, "deepspeed", name="doubled")
    process = workspace.start(start)
    workspace.wait_for_step("doubled", 20)
    for number in (INT, TERM, USR1):
        process.send_signal(number)
        time.sleep(0.05)
    assert process.wait(timeout=60) == 75, log(workspace)
    goes_on(workspace, "doubled", whole["deepspeed"], start)


def in_a_save(space: Workspace, name: str, seconds: float) -> subprocess.Popen[bytes]:
    """A run whose saves take so long, in the first of them."""
    settings = SETTINGS | {"checkpoint__interval": 30}
    process = space.start(["env", f"SLOW_SECONDS={seconds}", *SLOW_DISK, *space.arguments(**settings, name=name)])
    deadline = time.monotonic() + 120
    while not (space.path / "runs" / name / "checkpoints/step-00000030.tmp").exists():
        assert time.monotonic() < deadline and process.poll() is None, log(space)
        time.sleep(0.01)
    return process


@pytest.mark.slow
@pytest.mark.row(8)
def test_a_save_is_finished_and_not_made_twice(
    whole: dict[str, str], workspace: Workspace, row: Callable[..., None]
) -> None:
    process = in_a_save(workspace, "saving", 2)
    process.send_signal(TERM)
    signalled = time.monotonic()
    assert process.wait(timeout=60) == 75, log(workspace)
    detected = time.monotonic() - signalled
    assert (checkpoints(workspace, "saving"), stopped(workspace, "saving")["step"]) == (["step-00000030"], 30)
    assert log(workspace).count("saved runs/saving/checkpoints") == 1
    again = goes_on(workspace, "saving", whole["python"], command(workspace, "python", name="saving"))
    row(8, "python", detected=detected, lost=30 - again.step, restart=again.seconds)


@pytest.mark.slow
@pytest.mark.row(8)
def test_a_later_signal_ends_a_save_and_harms_nothing(whole: dict[str, str], workspace: Workspace) -> None:
    process = in_a_save(workspace, "left", 20)
    process.send_signal(TERM)
    time.sleep(5.5)
    assert process.poll() is None, log(workspace)
    process.send_signal(TERM)
    assert process.wait(timeout=3) == 128 + TERM, log(workspace)
    assert checkpoints(workspace, "left") == ["step-00000030.tmp"]
    succeeded(workspace.run(command(workspace, "python", name="left")))
    assert workspace.losses("left") == workspace.losses(whole["python"])


@pytest.mark.slow
def test_a_rank_that_cannot_save_outlives_its_launcher_by_30_s(workspace: Workspace) -> None:
    settings = SETTINGS | {"train__max_steps": 10**6, "parallel__timeout_seconds": 300}
    launcher = [*TORCHRUN, "--nproc_per_node", "2", "--master_port", str(free_port())]
    script = [*launcher, str(ROOT / "launch/pretrain.py"), *workspace.arguments(**settings, name="hung")]
    process = workspace.start(script)
    workspace.wait_for_step("hung", 20)
    waits, hangs = ranks_of(process)
    try:
        hangs.send_signal(signal.SIGSTOP)
        process.kill()
        start = time.monotonic()
        _, alive = psutil.wait_procs([waits], timeout=60)
        assert not alive and 28 < time.monotonic() - start < 40
    finally:
        hangs.kill()


@pytest.mark.slow
def test_a_start_is_stopped_at_the_next_point(whole: dict[str, str], workspace: Workspace) -> None:
    """By the clock: after 6 ms, before anything is trained."""
    done = workspace.run(command(workspace, "python", name="early", train__max_minutes=0.0001))
    assert done.returncode == 75, done.stdout + done.stderr
    assert "stopped by train.max_minutes before it trained" in done.stdout and "Traceback" not in done.stderr
    assert stopped(workspace, "early") == {"reason": "train.max_minutes", "step": None, "starts": [None]}
    succeeded(workspace.run(command(workspace, "python", name="early")))
    assert workspace.losses("early") == workspace.losses(whole["python"])


@pytest.mark.slow
def test_the_time_limit_saves(workspace: Workspace) -> None:
    start = command(workspace, "torchrun", name="timed", train__max_steps=10**6, train__max_minutes=0.75)
    done = workspace.run(start)
    assert done.returncode == 75, done.stdout + done.stderr
    told_of = stopped(workspace, "timed")
    assert told_of["reason"] == "train.max_minutes" and told_of["step"] == len(workspace.losses("timed")) > 0
