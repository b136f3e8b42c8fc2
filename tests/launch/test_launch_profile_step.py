"""launch/profile_step.py in real runs: what it leaves, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llm.profile.record import Record
from pool import free_port
from runs import DEEPSPEED, ROOT, TORCHRUN, Workspace, succeeded

SCRIPT = str(ROOT / "launch/profile_step.py")
LAUNCHERS: dict[str, tuple[list[str], int, dict[str, Any]]] = {
    "python": ([sys.executable, SCRIPT], 1, {"train__engine": "plain"}),
    "torchrun": (
        [*TORCHRUN, "--nproc_per_node", "2", "--master_port", "PORT", SCRIPT],
        2,
        {"train__engine": "fsdp", "parallel__zero_stage": 3},
    ),
    "deepspeed": (
        [*DEEPSPEED, "--num_gpus", "2", "--master_port", "PORT", SCRIPT],
        2,
        {"parallel__tensor_parallel": 2},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_it_profiles_under_each_launcher(launcher: str, workspace: Workspace, tmp_path: Path) -> None:
    command, world, settings = LAUNCHERS[launcher]
    words = workspace.arguments(name=launcher, **settings)
    command = [str(free_port()) if word == "PORT" else word for word in command]
    result = workspace.run([*command, *words, "--steps=2", f"--out={tmp_path / 'profile'}"])
    succeeded(result)
    assert "what slows it most" in result.stdout
    assert [Record.load(tmp_path / f"profile/rank-{rank}.json").steps for rank in range(world)] == [(6, 7)] * world
    assert (tmp_path / "profile/report.html").exists()
    assert not (workspace.path / f"runs/{launcher}-profile/checkpoints").exists()
    again = workspace.run([sys.executable, SCRIPT, "--compare", str(tmp_path / "profile"), str(tmp_path / "profile")])
    succeeded(again)


@pytest.mark.parametrize("words", [["--steps=0"], ["--steps=many"], ["--compare", "A"]])
def test_wrong_options_are_refused(words: list[str]) -> None:
    result = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2 and "error: " in result.stderr and words[0].split("=")[0] in result.stderr
