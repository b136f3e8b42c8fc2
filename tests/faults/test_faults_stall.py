"""Runs that hang outside a collective, or for a rank that does not come to one: who stalls is named, and they end."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from llm.cluster.failure import PASSING
from llm.cluster.heartbeat import LEAVE_SECONDS
from pool import free_port
from runs import DEEPSPEED, ROOT, TORCHRUN, Workspace, succeeded

STALL_SECONDS, MORE_SECONDS = 10, 15
SETTINGS = dict(
    train__engine="plain", train__max_steps=24, train__eval_interval=12, checkpoint__interval=8,
    train__stall_seconds=STALL_SECONDS, parallel__timeout_seconds=90, model__dropout=0.1,
)  # fmt: skip
# Fault, launcher, whom it is said of, what is said, and which function is in that rank's stack, if its process runs.
# Under torchrun the store is in the launcher; elsewhere it is in rank 0, and stops with it.
STALLS = [
    ("load@0:13", "python", 0, "rank 0 on HOST has made no progress for N s in load of step 13, wait (", "wait_here"),
    ("load@1:13", "torchrun", 1, "rank 1 on HOST has made no progress for N s in load of step 13, wait (", "wait_here"),
    ("load@all:13", "torchrun", 0, "all 2 ranks have made no progress for N s (rank 0: load of step 13", "wait_here"),
    ("reduce@1:13", "deepspeed", 1, "rank 1 on HOST has made no progress for N s in forward_backward", "wait_here"),
    ("reduce@0:13", "torchrun", 0, "rank 0 on HOST has made no progress for N s in forward_backward", "wait_here"),
    ("held@1:13", "torchrun", 1, "rank 1 on HOST was not heard of for N s, last in ", None),
    ("stopped@1:13", "torchrun", 1, "rank 1 on HOST was not heard of for N s, last in ", None),
    ("stopped@0:13", "torchrun", 0, "rank 0 on HOST was not heard of for N s, last in ", None),
    ("stopped@0:14", "deepspeed", 0, "rank 0 on HOST was not heard of for N s, last in ", None),
    ("write@0:16", "torchrun", 0, "rank 0 on HOST has made no progress for N s in save of step 16", "write_here"),
]
ROWS = {"reduce": 20, "stopped": 21, "load": 22}
pytestmark = pytest.mark.slow


def command(launcher: str, script: str, arguments: list[str]) -> list[str]:
    """Two ranks; under plain python one."""
    port = ["--master_port", str(free_port())]
    start = {
        "python": [sys.executable],
        "torchrun": [*TORCHRUN, "--nproc_per_node", "2", *port],
        "deepspeed": [*DEEPSPEED, "--num_gpus", "2", *port],
    }
    return [*start[launcher], str(ROOT / script), *arguments]


@contextmanager
def family_ended(process: psutil.Process) -> Iterator[None]:
    """Nothing that the test has started outlives it."""
    family = [process]
    try:
        yield
        family += process.children(recursive=True) if process.is_running() else []
    finally:
        for each in {*family, *(process.children(recursive=True) if process.is_running() else [])}:
            if each.is_running():
                each.kill()


def wait_for(path: Path, seconds: float, log: Path) -> None:
    deadline = time.monotonic() + seconds
    while not (path.exists() and path.stat().st_size):
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.1)


@pytest.fixture(scope="session")
def whole(workspace: Workspace) -> dict[str, str]:
    """Runs that nothing disturbed, by their launcher."""
    for name, launcher in (("stall-whole-1", "python"), ("stall-whole-2", "torchrun")):
        succeeded(workspace.run(command(launcher, "launch/pretrain.py", workspace.arguments(**SETTINGS, name=name))))
    return {"python": "stall-whole-1", "torchrun": "stall-whole-2", "deepspeed": "stall-whole-2"}


@pytest.mark.row(20, 21, 22)
@pytest.mark.parametrize(
    ("fault", "launcher", "rank", "said", "function"), STALLS, ids=[f"{s[0]}-{s[1]}" for s in STALLS]
)
def test_who_stalls_is_named_and_the_run_ends(
    fault: str,
    launcher: str,
    rank: int,
    said: str,
    function: str | None,
    whole: dict[str, str],
    workspace: Workspace,
    row: Callable[..., None],
) -> None:
    name = f"stall-{fault.replace('@', '-').replace(':', '-')}-{launcher}"
    arguments, folder = workspace.arguments(**SETTINGS, name=name), workspace.path / "runs" / name
    process = workspace.start(["env", f"FAULT={fault}", *command(launcher, "tests/faults/stalling.py", arguments)])
    log = workspace.path / "started.log"
    with family_ended(psutil.Process(process.pid)):
        wait_for(folder / "failed.json", 180, log)
        record: dict[str, Any] = json.loads((folder / "failed.json").read_text())
        fired = folder / f"fired-{rank}"
        detected = (folder / "failed.json").stat().st_mtime - fired.stat().st_mtime
        assert detected < STALL_SECONDS + MORE_SECONDS
        if function is None:  # when the others have ended, as its launcher would do 30 s later
            time.sleep(LEAVE_SECONDS + 2)
            with suppress(psutil.NoSuchProcess):  # a call into C may end at the launcher's first signal
                psutil.Process(int(fired.read_text())).kill()
        code = process.wait(timeout=60)
    assert code == PASSING == record["code"], log.read_text()[-4000:]
    expected = said.replace("HOST", record["host"]).split(" N ")
    assert record["rank"] == rank and record["reason"].startswith(expected[0]), record
    assert expected[1] in record["reason"], record
    assert ("waits in" in record["reason"]) == (launcher != "python" and "all" not in fault), record
    stacks = {path.name: path.read_text() for path in (folder / "stalls").iterdir()}
    assert function is None or function in stacks[f"rank-{rank}.txt"]
    running = [r for r in range(1 if launcher == "python" else 2) if function is not None or r != rank]
    assert set(stacks) == {f"rank-{r}.txt" for r in running}
    assert "error: the run stalls: " + record["reason"] in log.read_text()
    again = workspace.resume(command(launcher, "launch/pretrain.py", arguments))
    assert workspace.losses(name) == workspace.losses(whole[launcher])
    kind, step = fault.split("@")[0], int(fault.split(":")[1])
    if kind in ROWS:
        row(ROWS[kind], launcher, detected=detected, lost=step - 1 - again.step, restart=again.seconds)


@pytest.mark.row(23)
def test_a_slow_rank_is_named_within_20_steps_and_goes_on(workspace: Workspace, row: Callable[..., None]) -> None:
    arguments = workspace.arguments(**SETTINGS | {"train__max_steps": 44}, name="slow")
    done = workspace.run(["env", "FAULT=slow@1:21", *command("torchrun", "tests/faults/stalling.py", arguments)])
    succeeded(done)
    assert (workspace.path / "runs/slow/fired-1").exists()
    said = [line for line in done.stdout.splitlines() if " is slow: " in line]
    named = [int(line.split("step ")[1].split(":")[0]) for line in said if "rank 1 on " in line and "forward" in line]
    assert any(21 <= step <= 41 for step in named), said
    records = [line["slowest"] for line in workspace.metrics("slow") if "slowest" in line]
    assert [record["forward_rank"] for record in records][-2:] == [1, 1]
    assert all(record["forward_factor"] > 1.5 for record in records[-2:])
    row(23, "torchrun")
