"""launch/verify.py as a user starts it: what it prints and writes, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pool import free_port
from runs import DEEPSPEED, ROOT, TORCHRUN, Workspace

pytestmark = pytest.mark.ranks

SCRIPT = ROOT / "launch/verify.py"


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("verify"))


def deepspeed(ranks: int) -> list[str]:
    return [*DEEPSPEED, "--num_gpus", str(ranks), "--master_port", str(free_port())]


def torchrun(ranks: int) -> list[str]:
    return [*TORCHRUN, "--nproc_per_node", str(ranks), "--master_port", str(free_port())]


def verify(
    space: Workspace, launcher: list[str], *own: str, script: Path = SCRIPT, **overrides: object
) -> subprocess.CompletedProcess[str]:
    return space.run([*launcher, str(script), *own, *space.arguments(**overrides)])


def test_deepspeed_passes(space: Workspace) -> None:
    layout = dict(parallel__tensor_parallel=2, parallel__sequence_parallel="true", parallel__zero_stage=1)
    result = verify(space, deepspeed(2), "--steps", "2", name="good", **layout)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "\nPASS\n" in result.stdout
    report = json.loads((space.path / "runs/good/verify.json").read_text())
    assert report["passed"] and report["steps"] == 2
    assert report["layout"]["tensor_parallel"] == 2 and report["layout"]["sequence_parallel"] is True
    assert report["parameters"]["blocks.0.qkv.weight"]["gradient"]["passed"]


@pytest.mark.slow
def test_torchrun_fails_on_a_wrong_layout(space: Workspace) -> None:
    broken = ROOT / "tests/faults/faulty_layout.py"
    layout = dict(parallel__tensor_parallel=2, parallel__sequence_parallel="true", train__precision="bf16")
    result = verify(
        space, torchrun(2), "--steps=1", "--json=broken.json", script=broken, parallel__zero_stage=2, **layout
    )
    assert result.returncode == 1, result.stdout[-3000:] + result.stderr[-3000:]
    assert "\nFAIL\n" in result.stdout
    assert "in verify_layout" not in result.stderr  # nothing crashed
    report = json.loads((space.path / "broken.json").read_text())
    assert not report["passed"]
    assert not report["parameters"]["norm.weight"]["gradient"]["passed"]
    assert report["parameters"]["blocks.0.qkv.weight"]["gradient"]["passed"]
    assert any("norm.weight" in failure for failure in report["failures"])


@pytest.mark.slow
def test_python_alone(space: Workspace) -> None:
    result = verify(space, [sys.executable], "--steps=1", "--json=deep/folder/alone.json", train__engine="plain")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert json.loads((space.path / "deep/folder/alone.json").read_text())["layout"]["data_parallel"] == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps=0"], "--steps is 0; expected at least 1"),
        (["--steps=many"], "invalid int value: 'many'"),
        (["--jsn=x"], "unknown key 'jsn'"),
        (["--parallel.tensor_parallel=2"], "world of 1 ranks is not a multiple of parallel.tensor_parallel 2"),
        (["--json=/proc/none/x.json"], "the folder cannot be made"),
    ],
)
def test_wrong_input_ends_with_2(arguments: list[str], said: str, space: Workspace) -> None:
    result = space.run([sys.executable, str(SCRIPT), *arguments])
    assert result.returncode == 2, result.stdout[-3000:] + result.stderr[-3000:]
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_help_lists_its_own_options_and_the_configs(space: Workspace) -> None:
    result = space.run([sys.executable, str(SCRIPT), "--help"])
    assert result.returncode == 0
    for text in ("--steps N", "--json PATH", "--parallel.tensor_parallel", "--config FILE"):
        assert text in result.stdout
