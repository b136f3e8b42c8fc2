"""Compiled blocks on several ranks: the bits of the same layout without them, and everybody's checkpoints."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chosen import slow_but
from llm.checkpoint.reader import open_checkpoint
from llm.config import RunConfig
from llm.parallel.mesh import Mesh
from llm.train.build import build_engine
from matrix import graphs_by
from pool import RankPool
from test_train_restart import first_half, save, tensors
from tiny_run import case, on_ranks

CPU = torch.device("cpu")
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2-sp-fsdp2": dict(
        model=dict(dropout=0.1),
        data=dict(document_masks=True),
        parallel=dict(tensor_parallel=2, sequence_parallel=True, zero_stage=2),
        train=dict(engine="fsdp", activation_checkpointing="selective"),
    ),
    "fsdp3-bf16": dict(
        parallel=dict(zero_stage=3), train=dict(engine="fsdp", precision="bf16", activation_checkpointing="full")
    ),
    "tp2-zero1": dict(parallel=dict(tensor_parallel=2, zero_stage=1)),
    "zero2-bf16": dict(model=dict(dropout=0.1), parallel=dict(zero_stage=2), train=dict(precision="bf16")),
    "plain": dict(train=dict(engine="plain")),
}


def with_blocks(config: RunConfig) -> RunConfig:
    return replace(config, train=replace(config.train, compile="blocks"))


def trained(config: RunConfig) -> dict[str, Any]:
    with graphs_by("aot_eager", config):
        return on_ranks(config, 2)


@pytest.mark.parametrize("name", slow_but(["tp2-sp-fsdp2"], LAYOUTS))
def test_the_same_bits(name: str, two_ranks: RankPool) -> None:
    config = case(**LAYOUTS[name])
    for found, expected in zip(
        two_ranks.run(trained, with_blocks(config)), two_ranks.run(trained, config), strict=True
    ):
        gradients = found.pop("gradients"), expected.pop("gradients")
        assert found == expected
        for key in gradients[1]:
            assert np.array_equal(gradients[0][key], gradients[1][key]), key


def written(config: RunConfig, root: Path) -> list[float]:
    with graphs_by("aot_eager", config):
        return first_half(config, root)


def reread(config: RunConfig, root: Path, other: Path) -> None:
    """Load the newest checkpoint of a layout and save it again."""
    mesh = Mesh.create(config.parallel, "cpu")
    with graphs_by("aot_eager", config):
        engine = build_engine(config, mesh, CPU, open_checkpoint(root / "step-00000006"))
    save(engine, mesh, other, 6)
    engine.close()


PAIRS = [f"{first} to {second}" for first, second in product(LAYOUTS, LAYOUTS)]


@pytest.mark.parametrize("pair", slow_but(["tp2-sp-fsdp2 to plain", "plain to fsdp3-bf16"], PAIRS))
def test_checkpoints_of_and_for_other_layouts(pair: str, two_ranks: RankPool, tmp_path: Path) -> None:
    """Written with compiled blocks and read without them, then read with them: bit for bit, by the same names."""
    first, second = (case(**LAYOUTS[name]) for name in pair.split(" to "))
    two_ranks.run(written, with_blocks(first), tmp_path / "a")
    two_ranks.run(reread, second, tmp_path / "a", tmp_path / "b")
    two_ranks.run(reread, with_blocks(second), tmp_path / "b", tmp_path / "c")
    a, b, c = (tensors(tmp_path / folder) for folder in "abc")
    assert a.keys() == b.keys() == c.keys()
    assert not [name for name, _ in a if "_orig_mod" in name]
    for key in a:
        assert np.array_equal(a[key], b[key]) and np.array_equal(a[key], c[key]), key
