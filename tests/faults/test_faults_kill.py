"""Killed runs: started again with the same command they end as if nothing had happened, to the last bit."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import psutil
import pytest

from chosen import slow_but
from runs import Workspace, succeeded


def ranks_of(launcher: psutil.Process) -> list[psutil.Process]:
    children = launcher.children(recursive=True)
    return [c for c in children if "launch/pretrain.py" in " ".join(c.cmdline()) and not c.children()]


def kill_one_rank(launcher: psutil.Process) -> None:
    ranks_of(launcher)[-1].send_signal(signal.SIGKILL)


def kill_all_ranks(launcher: psutil.Process) -> None:
    for rank in ranks_of(launcher):
        rank.send_signal(signal.SIGKILL)


def kill_the_launcher(launcher: psutil.Process) -> None:
    launcher.send_signal(signal.SIGKILL)


# Long enough that the run is not over when the ranks notice that their launcher is gone.
LONG = dict(train__max_steps=120, checkpoint__interval=20, train__eval_interval=60, parallel__zero_stage=1)


@pytest.fixture(scope="session")
def uninterrupted(workspace: Workspace) -> Workspace:
    succeeded(workspace.deepspeed(2, name="whole", **LONG))
    return workspace


@pytest.mark.row(1, 4)
@pytest.mark.parametrize("kill", slow_but([], [kill_one_rank, kill_all_ranks, kill_the_launcher]))
def test_a_killed_run_ends_as_the_whole_one(
    uninterrupted: Workspace, kill: Callable[[psutil.Process], None], row: Callable[..., None]
) -> None:
    space, name = uninterrupted, kill.__name__
    process = space.start(space.deepspeed_command(2, name=name, **LONG))
    space.wait_for_step(name, 50)
    launcher = psutil.Process(process.pid)
    family = launcher.children(recursive=True)
    assert len(ranks_of(launcher)) == 2
    kill(launcher)
    killed = time.monotonic()
    process.wait(timeout=60)
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive, "processes outlive their launcher"
    detected, last = time.monotonic() - killed, len(space.losses(name))
    assert last < 120, "the run was over before the kill"
    again = space.resume(space.deepspeed_command(2, name=name, **LONG))
    assert last - again.step < 20
    number = 1 if kill is kill_one_rank else 4
    row(number, "deepspeed", detected=detected, lost=last - again.step, restart=again.seconds)
    assert space.losses(name) == space.losses("whole")
    assert validation(space, name) == validation(space, "whole")


def validation(space: Workspace, name: str) -> list[float]:
    return [record["val_loss"] for record in space.metrics(name) if "val_loss" in record]


@pytest.mark.slow
@pytest.mark.row(33)
def test_a_second_start_is_refused_and_the_first_goes_on(uninterrupted: Workspace, row: Callable[..., None]) -> None:
    """The very same command, port and all."""
    command = uninterrupted.deepspeed_command(2, name="busy", train__max_steps=100000)
    process = uninterrupted.start(command)
    try:
        uninterrupted.wait_for_step("busy", 2)
        started = time.monotonic()
        second = uninterrupted.run(command)
        row(33, "deepspeed", detected=time.monotonic() - started)
        assert second.returncode == 2, second.stdout + second.stderr
        assert second.stderr.count("is in use by process") == 1
        before = len(uninterrupted.metrics("busy"))
        time.sleep(1)
        assert process.poll() is None
        assert len(uninterrupted.metrics("busy")) > before
    finally:
        os.kill(process.pid, signal.SIGTERM)
        process.wait(timeout=60)


@pytest.mark.slow
def test_a_complete_run_says_so(uninterrupted: Workspace) -> None:
    again = uninterrupted.deepspeed(2, name="whole", **LONG)
    succeeded(again)
    assert "is complete: 120 steps" in again.stdout
