"""Whole runs on one GPU: each precision follows fp32, fp16's loss scaling included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from runs import Workspace, succeeded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
# Of the loss, in nats per token, over 40 steps from the same weights and batches.
BOUNDS = {"fp32": 2e-3, "bf16": 5e-2, "fp16": 5e-2}


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The reference run: the plain engine in fp32 with PyTorch's own operators."""
    space = Workspace(Path(tmp_path_factory.mktemp("gpu")))
    succeeded(space.prepare())
    environment = space.environment()
    del environment["DS_ACCELERATOR"]
    settings = dict(train__engine="plain", train__impl="torch")
    succeeded(space.python(environment, name="reference", **settings))
    return space


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", BOUNDS)
def test_precision_follows_fp32(space: Workspace, precision: str, stage: int) -> None:
    environment = space.environment()
    del environment["DS_ACCELERATOR"]
    name = f"{precision}-{stage}"
    settings = dict(train__precision=precision, train__impl="triton", parallel__zero_stage=stage)
    succeeded(space.python(environment, name=name, **settings))
    losses, reference = space.losses(name), space.losses("reference")
    assert losses.keys() == reference.keys()
    # fp16 skips steps until its loss scale fits; each one delays the curve.
    skipped = space.metrics(name)[-2]["skipped_steps"]
    assert precision == "fp16" or skipped == 0
    assert max(abs(losses[s] - reference[s - skipped]) for s in range(skipped + 1, 41)) < BOUNDS[precision]
