"""Checkpoints of runs with Muon, FP8 and compiled blocks: every layout reads the bits that another wrote."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from chosen import slow_but
from llm.checkpoint.reader import open_checkpoint
from llm.config import RunConfig
from llm.config.matrices import MOMENTS, moments_of
from llm.parallel.fp8 import FP8Linear
from llm.parallel.mesh import Mesh
from llm.train import compiled
from llm.train.build import build_engine
from llm.train.state_hashes import StateHashes
from llm.trained import load_trained
from matrix import graphs_by
from pool import RankPool
from test_train_restart import save, steps
from tiny_run import case
from trained_run import write_run

LLAMA = dict(norm="rmsnorm", activation="swiglu", bias=False)
LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": dict(train=dict(engine="plain")),
    "fsdp": dict(parallel=dict(zero_stage=3), train=dict(engine="fsdp")),
    "zero1-tp2": dict(parallel=dict(zero_stage=1, tensor_parallel=2), train=dict(precision="bf16")),
    "zero1": dict(parallel=dict(zero_stage=1)),
    "zero2-bf16": dict(parallel=dict(zero_stage=2), train=dict(precision="bf16")),
    "zero3": dict(parallel=dict(zero_stage=3)),
}
TRAIN: dict[str, dict[str, Any]] = {
    "muon": {},
    "fp8": dict(fp8="tensorwise"),
    "compiled": dict(compile="blocks"),
    "muon-fp8-compiled": dict(fp8="tensorwise", compile="blocks"),
}


def config_of(layout: str, feature: str) -> RunConfig:
    sections = LAYOUTS[layout]
    train = dict(TRAIN[feature], **sections.get("train", {}))
    if layout == "zero3":  # gathers weights within a block
        train.pop("compile", None)
    name = "muon" if "muon" in feature else "adamw"
    return case(model=LLAMA, optim=dict(name=name), **dict(sections, train=train))


def trained(config: RunConfig, root: Path) -> list[str]:
    """Save after three steps; what the comparison of states then finds. Collective."""
    mesh = Mesh.create(config.parallel, "cpu")
    with graphs_by("aot_eager", config):
        engine = build_engine(config, mesh, torch.device("cpu"))
        hashes = StateHashes(engine)
        steps(engine, config, mesh, 0, 3)
    hashes.after_step(due=True)
    hashes.compare()
    save(engine, mesh, root, 3)
    engine.close()
    return hashes.found()


def again(config: RunConfig, root: Path, other: Path) -> None:
    """Read that checkpoint, and save what was read. Collective."""
    mesh = Mesh.create(config.parallel, "cpu")
    reader = open_checkpoint(root / "step-00000003")
    engine = build_engine(config, mesh, torch.device("cpu"), reader)
    save(engine, mesh, other, 3)
    engine.close()


def tensors(root: Path, step: int = 3) -> dict[tuple[str, str], Tensor]:
    reader = open_checkpoint(root / f"step-{step:08d}")
    return {key: reader.read(*key) for key in reader.manifest.tensors}


ALL = "muon-fp8-compiled"
FAST = [("muon", "zero1-tp2", "fsdp"), (ALL, "fsdp", "zero1-tp2"), (ALL, "plain", "zero3")]
CASES = [(feature, *pair) for feature in TRAIN for pair in product(LAYOUTS, repeat=2) if pair[0] != pair[1]]


@pytest.mark.ranks
@pytest.mark.parametrize(("feature", "first", "second"), slow_but(FAST, CASES, several=True))
def test_every_layout_reads_what_another_wrote(
    feature: str, first: str, second: str, two_ranks: RankPool, tmp_path: Path
) -> None:
    one, other = config_of(first, feature), config_of(second, feature)
    assert two_ranks.run(trained, one, tmp_path / "a") == [[], []]
    two_ranks.run(again, other, tmp_path / "a", tmp_path / "b")
    before, after = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    moments = {name: tuple(kind for kind in MOMENTS if (name, kind) in before) for name, _ in before}
    assert moments == {name: moments_of(name, one.optim) for name in moments}


@pytest.mark.parametrize("feature", TRAIN)
def test_later_tools_read_the_same_model(feature: str, tmp_path: Path) -> None:
    """As evaluate.py, generate.py and export do: in fp32, without the feature."""
    config = config_of("plain", feature)
    write_run(tmp_path / "run", replace(config, model=replace(config.model, vocab_size=272)))
    with patch.object(compiled, "CompiledBlocks", side_effect=AssertionError):
        model = load_trained(tmp_path / "run").model
    found, expected = dict(model.named_parameters()), tensors(tmp_path / "run" / "checkpoints", 5)
    assert found.keys() == {name for name, _ in expected}
    assert all(torch.equal(parameter, expected[name, "master"]) for name, parameter in found.items())
    assert not any(isinstance(module, FP8Linear) for module in model.modules())
