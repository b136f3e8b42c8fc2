"""Runs that are killed, or crash, and start again by themselves: to the last bit, on fewer hosts, or not for ever."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil
import pytest

from chosen import slow_but
from pool import free_port
from runs import DEEPSPEED, ROOT, Workspace, contents, succeeded

SETTINGS = dict(train__engine="plain", train__max_steps=80, train__eval_interval=40, checkpoint__interval=20)
SUPERVISE = [sys.executable, str(ROOT / "launch/supervise.py"), "--wait=0.1"]
PRETRAIN = str(ROOT / "launch/pretrain.py")


def command(launcher: str, space: Workspace, *, supervised: bool, name: str, **overrides: Any) -> list[str]:
    start = {
        "python": [sys.executable, PRETRAIN],
        "torchrun": ["env", "RANKS=2", str(ROOT / "launch/torchrun.sh")],
        "deepspeed": [*DEEPSPEED, "--num_gpus", "2", "--master_port", str(free_port()), PRETRAIN],
    }[launcher]
    words = [*start, *space.arguments(**SETTINGS | overrides, name=name)]
    return [*SUPERVISE, "--", *words] if supervised else words


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def ranks_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Those that have begun, while processes come and go."""
    found = []
    for each in family(process):
        with suppress(psutil.Error):
            words = each.cmdline()
            if PRETRAIN in words and "torch.distributed.run" not in words and not each.children():
                found.append(each)
    return found


def lines(space: Workspace, name: str) -> list[dict[str, Any]]:
    path = space.path / "runs" / name / "restarts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def log(space: Workspace) -> str:
    return (space.path / "started.log").read_text()


def ended(process: subprocess.Popen[bytes], space: Workspace, code: int = 0) -> None:
    try:
        assert process.wait(timeout=120) == code, log(space)[-3000:]
    finally:
        if process.poll() is None:
            for each in [*family(process), process]:
                each.kill()


def undisturbed(space: Workspace, launcher: str) -> dict[int, float]:
    """The losses of a run that nothing disturbed."""
    name = "undisturbed-1" if launcher == "python" else "undisturbed-2"
    if not space.metrics(name):
        launcher = "python" if launcher == "python" else "torchrun"
        succeeded(space.run(command(launcher, space, supervised=False, name=name)))
    return space.losses(name)


FAULTS = [
    ("python", True, "a rank"),
    ("torchrun", False, "a rank"),
    ("torchrun", True, "a rank"),
    ("torchrun", True, "all"),
    ("deepspeed", True, "a rank"),
    ("deepspeed", True, "all"),
    ("deepspeed", True, "the launcher"),
]


@pytest.mark.row(1, 4)
@pytest.mark.parametrize("fault", slow_but([], FAULTS), ids=str)
def test_a_killed_run_starts_again_and_loses_no_bit(
    fault: tuple[str, bool, str], workspace: Workspace, row: Callable[..., None]
) -> None:
    launcher, supervised, victim = fault
    space, name = workspace, f"killed-{launcher}-{supervised}-{victim.replace(' ', '-')}"
    expected = undisturbed(space, launcher)
    process = space.start(command(launcher, space, supervised=supervised, name=name))
    space.wait_for_step(name, 25)
    ranks = ranks_of(process)
    assert len(ranks) == (1 if launcher == "python" else 2)
    under = family(process)
    for each in {"a rank": ranks[-1:], "all": under[::-1], "the launcher": under[:1]}[victim]:
        each.kill()
    killed, steps = time.time(), len(space.metrics(name))
    ended(process, space)
    assert space.losses(name) == expected
    assert "resumed from step" in log(space)
    assert not (space.path / "runs" / name / "failed.json").exists()
    if supervised:
        first, last = lines(space, name)
        assert first["code"] not in (0, 75) and 20 <= first["step"] < 80, first
        assert f"resumed from step {first['step']}" in log(space)
        assert (last["code"], last["reason"], last["step"]) == (0, "finished", 80)
        assert log(space).count("supervise: ") == 1
        lost = max(0, steps - first["step"])
        number = 1 if victim == "a rank" else 4
        row(number, f"supervise {launcher}", detected=first["end"] - killed, lost=lost)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["python", "torchrun", "deepspeed"])
def test_a_supervised_run_that_is_stopped_stays_stopped(launcher: str, workspace: Workspace) -> None:
    space, name = workspace, f"supervised-{launcher}"
    process = space.start(command(launcher, space, supervised=True, name=name, train__max_steps=10**6))
    space.wait_for_step(name, 30)
    ranks = ranks_of(process)
    process.send_signal(signal.SIGTERM)
    ended(process, space, 75)
    assert not [rank for rank in ranks if rank.is_running()]
    (line,) = lines(space, name)
    assert line["code"] == 75 and line["step"] == len(space.losses(name)) >= 30


@pytest.mark.slow
def test_a_run_ends_with_its_supervisor(workspace: Workspace) -> None:
    space = workspace
    process = space.start(command("torchrun", space, supervised=True, name="orphan", train__max_steps=10**6))
    space.wait_for_step("orphan", 30)
    under = family(process)
    process.kill()
    assert not psutil.wait_procs(under, timeout=60)[1]
    stopped = json.loads((space.path / "runs/orphan/stopped.json").read_text())
    assert stopped["reason"] == "the death of its launcher" and stopped["step"] == len(space.losses("orphan"))


# What launch/deepspeed.sh does with a hostfile, but with all of its ranks on this host.
ONE_HOST_FOR_ALL = f"""#!/usr/bin/env bash
RANKS=$(awk -F= '{{n += $2}} END {{print n}}' "$HOSTFILE") exec {ROOT}/launch/torchrun.sh "$@"
"""
SSH = """#!/bin/sh
[ "$6" = gone ] && [ -e gone ] && exit 255
echo "node-$6"
"""


@pytest.mark.slow
@pytest.mark.row(6)
def test_a_host_that_does_not_come_back(workspace: Workspace, row: Callable[..., None]) -> None:
    space, name, gone = workspace, "one-host-left", workspace.path / "gone"
    tools = space.path / "tools"
    tools.mkdir()
    for script, text in (("ssh", SSH), ("deepspeed.sh", ONE_HOST_FOR_ALL)):
        (tools / script).write_text(text)
        (tools / script).chmod(0o755)
    (tools / "hosts").write_text("here slots=1\ngone slots=1\n")
    environ = [f"PATH={tools}:{space.environment()['PATH']}", f"HOSTFILE={tools / 'hosts'}"]
    words = [*SUPERVISE, "--host-wait=0", "--", str(tools / "deepspeed.sh"), *space.arguments(**SETTINGS, name=name)]
    process = space.start(["env", *environ, *words])
    space.wait_for_step(name, 25)
    gone.touch()
    ranks_of(process)[-1].kill()
    killed, steps = time.time(), len(space.metrics(name))
    try:
        ended(process, space)
    finally:
        gone.unlink()
    assert "the next start has 1 hosts of 2: here" in log(space)
    first = lines(space, name)[0]
    row(6, "supervise torchrun", detected=first["end"] - killed, lost=max(0, steps - first["step"]))
    expected, found, saved = undisturbed(space, "torchrun"), space.losses(name), first["step"]
    assert found.keys() == expected.keys() and 20 <= saved <= 60
    assert all(found[step] == expected[step] for step in range(1, saved + 1))
    assert all(found[step] == pytest.approx(expected[step], rel=1e-5) for step in range(saved + 1, saved + 21))


CRASHES = f"""
import runpy, sys
sys.path[:0] = [{str(ROOT)!r}]
from llm.train.loop import Trainer
step = Trainer.step
def crash(self):
    if self.run.step == 7:
        raise RuntimeError("always in step 8")
    return step(self)
Trainer.step = crash
runpy.run_path({PRETRAIN!r}, run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.row(31)
def test_a_run_that_always_crashes_is_given_up(workspace: Workspace, row: Callable[..., None]) -> None:
    space, script = workspace, workspace.path / "pretrain.py"
    script.write_text(CRASHES)
    words = space.arguments(**SETTINGS | dict(checkpoint__interval=4), name="crashes")
    checkpoints = space.path / "runs/crashes/checkpoints"
    process = space.start([*SUPERVISE, "--restarts=2", "--", sys.executable, str(script), *words])
    space.wait_for_step("crashes", 5)
    while not (checkpoints / "latest").exists():
        time.sleep(0.01)
    before, begin = contents(checkpoints), time.monotonic()
    ended(process, space, 1)
    row(31, "supervise python", detected=time.monotonic() - begin)
    assert contents(checkpoints) == before and [*checkpoints.glob("step-*")] == [checkpoints / "step-00000004"]
    told = [line for line in log(space).splitlines() if line.startswith("supervise: ")]
    assert len(told) == 3 and "no progress between restarts, 2 in a row" in told[-1]
    assert [(line["code"], line["step"]) for line in lines(space, "crashes")] == [(1, 4)] * 3
    assert "RuntimeError: always in step 8" in lines(space, "crashes")[-1]["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("supervised", [False, True])
def test_bad_input_is_not_started_again(supervised: bool, workspace: Workspace) -> None:
    undisturbed(workspace, "torchrun")
    name = "undisturbed-2"
    for overrides in (dict(name=name, model__n_layer=3, train__max_steps=90), dict(name="odd", model__n_head=3)):
        done = workspace.run(command("torchrun", workspace, supervised=supervised, **overrides))
        assert done.returncode == 2, done.stdout + done.stderr
        assert done.stderr.count("error: ") == 1 and "supervise: " not in done.stderr, done.stderr
        assert supervised or "Traceback" not in done.stderr  # with no restart left torchrun shows its own
    assert not (workspace.path / "runs/odd").exists()
    failed = workspace.path / "runs" / name / "failed.json"
    assert json.loads(failed.read_text())["code"] == 2
    succeeded(workspace.run(command("torchrun", workspace, supervised=supervised, name=name)))
    assert not failed.exists()


@pytest.mark.slow
def test_a_rank_that_a_stop_ends_is_not_started_again(workspace: Workspace) -> None:
    """The ranks are told while Python starts: the signal ends them, and torchrun would start them again."""
    name = "too-early"
    process = workspace.start(command("torchrun", workspace, supervised=False, name=name))
    deadline = time.monotonic() + 60
    while not ranks_of(process):
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGTERM)
    ended(process, workspace, 75)
    assert not workspace.losses(name)
