"""`launch/verify.py` on the GPUs that there are: engines, stages, precisions, offloading, and TP if two can share."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from pool import free_port
from runs import ROOT, TORCHRUN, Workspace

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS == 0, reason="needs an NVIDIA GPU")]
SETTINGS = [
    "--model.n_layer=2", "--model.n_head=4", "--model.d_model=128", "--model.vocab_size=1022", "--model.dropout=0.1",
    "--train.global_batch_size=32", "--train.micro_batch_size=2",
]  # fmt: skip


def verify(folder: Path, *overrides: str) -> None:
    """Run it on every GPU; the report says that all is equal."""
    space = Workspace(folder)
    environment = space.environment()
    del environment["DS_ACCELERATOR"]
    launcher = [sys.executable]
    if GPUS > 1:
        launcher = [*TORCHRUN, "--nproc_per_node", str(GPUS), "--master_port", str(free_port())]
    command = [*launcher, str(ROOT / "launch/verify.py"), *SETTINGS, *overrides]
    result = space.run(command, environment)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-3000:]
    assert json.loads((folder / "runs/run/verify.json").read_text())["passed"]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("engine", "stage"), [("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3), ("fsdp", 2), ("fsdp", 3)]
)
def test_engines_and_precisions(tmp_path: Path, engine: str, stage: int, precision: str) -> None:
    verify(tmp_path, f"--train.engine={engine}", f"--parallel.zero_stage={stage}", f"--train.precision={precision}")


@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_documents(tmp_path: Path, precision: str, position: str) -> None:
    verify(
        tmp_path, "--data.document_masks=true", f"--model.position={position}", f"--train.precision={precision}",
        "--parallel.zero_stage=2", "--train.activation_checkpointing=selective",
    )  # fmt: skip


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloaded_optimizer(tmp_path: Path, stage: int) -> None:
    verify(tmp_path, f"--parallel.zero_stage={stage}", "--parallel.offload=optimizer", "--train.precision=bf16")


@pytest.mark.parametrize("engine", ["deepspeed", "fsdp"])
def test_offloaded_parameters(tmp_path: Path, engine: str) -> None:
    verify(
        tmp_path, f"--train.engine={engine}", "--parallel.zero_stage=3", "--parallel.offload=all",
        "--train.precision=bf16",
    )  # fmt: skip


@pytest.mark.skipif(GPUS % 2 == 1, reason="tensor parallelism needs an even number of GPUs")
@pytest.mark.parametrize("sequence_parallel", ["false", "true"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_tensor_parallel(tmp_path: Path, precision: str, sequence_parallel: str) -> None:
    verify(
        tmp_path, "--parallel.tensor_parallel=2", f"--parallel.sequence_parallel={sequence_parallel}",
        "--parallel.zero_stage=1", f"--train.precision={precision}",
    )  # fmt: skip
