"""The same script under every launcher and layout gives the same losses, through the real loader and loop."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest

from chosen import slow_but
from runs import ROOT, Workspace, succeeded

SAME = dict(train__max_steps=8, optim__lr=1e-3, model__dropout=0.1)


def mpirun(space: Workspace, ranks: int, **overrides: object) -> subprocess.CompletedProcess[str]:
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", str(ranks), sys.executable]
    return space.run([*command, str(ROOT / "launch/pretrain.py"), *space.arguments(**overrides)])


LAUNCHES: dict[str, tuple[Callable, int, dict]] = {
    "deepspeed-tp2": (Workspace.deepspeed, 2, dict(parallel__tensor_parallel=2)),
    "deepspeed-zero3": (Workspace.deepspeed, 2, dict(parallel__zero_stage=3, train__micro_batch_size=4)),
    "torchrun-tp2-dp2": (Workspace.torchrun, 4, dict(parallel__tensor_parallel=2, parallel__zero_stage=1)),
    "mpirun-zero1": (mpirun, 2, dict(parallel__zero_stage=1, train__micro_batch_size=1)),
}


@pytest.fixture(scope="session")
def alone(workspace: Workspace) -> dict[int, float]:
    succeeded(workspace.python(name="alone", **SAME))
    return workspace.losses("alone")


@pytest.mark.parametrize("name", slow_but([], LAUNCHES))
def test_same_losses(name: str, alone: dict[int, float], workspace: Workspace) -> None:
    launch, ranks, layout = LAUNCHES[name]
    if launch is mpirun and shutil.which("mpirun") is None:
        pytest.skip("mpirun is not installed (Debian: apt-get install openmpi-bin)")
    succeeded(launch(workspace, ranks, name=name, **{**SAME, **layout}))
    losses = workspace.losses(name)
    assert losses.keys() == alone.keys()
    assert max(abs(losses[step] - alone[step]) for step in alone) <= 1e-5
    validations = [[r["val_loss"] for r in workspace.metrics(n) if "val_loss" in r] for n in (name, "alone")]
    assert validations[0] == pytest.approx(validations[1], abs=1e-5)
