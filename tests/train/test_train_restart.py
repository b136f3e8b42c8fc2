"""A run that stops and goes on equals one that did not: to the last bit on its layout, closely on another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from states import state_of

from chosen import slow_but
from llm.checkpoint.reader import find_latest, open_checkpoint
from llm.checkpoint.writer import write_checkpoint
from llm.config import RunConfig
from llm.errors import CheckpointError
from llm.parallel.mesh import Mesh
from llm.slices import Slice
from llm.train.build import build_engine, build_model
from pool import RankPool
from tiny_run import batches, case, plain, target_count

CPU = torch.device("cpu")


def steps(engine: Any, config: RunConfig, mesh: Mesh, first: int, count: int) -> list[float]:
    losses = []
    for step in range(first, first + count):
        engine.set_lr(config.optim.lr)
        data = batches(config, step, mesh.dp_rank, mesh.dp_size, False)
        losses.append(float(engine.forward_backward(data, target_count(False))))
        engine.step()
    return losses


def save(engine: Any, mesh: Mesh, root: Path, step: int) -> None:
    write_checkpoint(root, step, engine.state_pieces(), state_of(step, engine=engine.scalar_state()), keep_last=9)


def first_half(config: RunConfig, root: Path) -> list[float]:
    """Train 3 steps, save, train 3 more (returned), save again."""
    mesh = Mesh.create(config.parallel, "cpu")
    engine = build_engine(config, mesh, CPU)
    steps(engine, config, mesh, 0, 3)
    save(engine, mesh, root, 3)
    losses = steps(engine, config, mesh, 3, 3)
    save(engine, mesh, root, 6)
    engine.close()
    return losses


def second_half(config: RunConfig, root: Path, other: Path) -> list[float]:
    """Read the first checkpoint under `config`, train 3 steps (returned), save under `other`."""
    mesh = Mesh.create(config.parallel, "cpu")
    engine = build_engine(config, mesh, CPU)
    reader = open_checkpoint(root / "step-00000003")
    scalars = reader.state["engine"]
    engine.load_scalar_state(scalars)
    engine.load_pieces(reader, scalars["optimizer_step"])
    losses = steps(engine, config, mesh, 3, 3)
    save(engine, mesh, other, 6)
    engine.close()
    return losses


def tensors(root: Path) -> dict[tuple[str, str], Any]:
    latest, warnings = find_latest(root)
    assert latest is not None and not warnings
    reader = open_checkpoint(latest)
    names, kinds = {name for name, _ in reader.manifest.tensors}, ("master", "exp_avg", "exp_avg_sq")
    return {(name, kind): reader.read(name, kind).numpy() for name in names for kind in kinds}


SAME_LAYOUT = {
    **{f"zero{stage}": dict(parallel=dict(zero_stage=stage)) for stage in range(4)},
    **{f"zero{stage}-bf16": dict(parallel=dict(zero_stage=stage), train=dict(precision="bf16")) for stage in (1, 2, 3)},
    "tp2-dropout": dict(parallel=dict(tensor_parallel=2), model=dict(dropout=0.1)),
    "tp2-padded-zero1": dict(parallel=dict(tensor_parallel=2, zero_stage=1), model=dict(vocab_size=51)),
    "zero3-resident": dict(parallel=dict(zero_stage=3)),  # with DeepSpeed's own persistence threshold
    "plain-fp16": dict(train=dict(engine="plain", precision="fp16")),
    "plain": dict(train=dict(engine="plain")),
    "plain-bf16": dict(train=dict(engine="plain", precision="bf16")),
}


@pytest.mark.parametrize("name", slow_but(["zero3", "tp2-dropout", "plain-fp16"], SAME_LAYOUT))
def test_restart_is_exact(name: str, two_ranks: RankPool, tmp_path: Path) -> None:
    config = case(**SAME_LAYOUT[name])
    if name == "zero3-resident":
        config = replace(config, deepspeed={})
    whole = two_ranks.run(first_half, config, tmp_path / "a")
    resumed = two_ranks.run(second_half, config, tmp_path / "a", tmp_path / "b")
    assert resumed == whole
    before, after = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert before.keys() == after.keys()
    assert {key[0] for key in before} == {n for n, _ in build_model(config, None).named_parameters()}
    for key, value in before.items():
        assert np.array_equal(value, after[key]), key


OTHER_LAYOUTS = {
    "zero1-to-tp2": (dict(parallel=dict(zero_stage=1)), dict(parallel=dict(tensor_parallel=2))),
    "tp2-to-zero3": (dict(parallel=dict(tensor_parallel=2)), dict(parallel=dict(zero_stage=3))),
    "zero3-to-plain": (dict(parallel=dict(zero_stage=3)), dict(train=dict(engine="plain"))),
    "zero2-to-zero0": (dict(parallel=dict(zero_stage=2)), dict(parallel=dict(zero_stage=0))),
}


@pytest.mark.parametrize("name", slow_but(["tp2-to-zero3", "zero3-to-plain"], OTHER_LAYOUTS))
def test_another_layout_goes_on(name: str, two_ranks: RankPool, tmp_path: Path) -> None:
    first, second = (case(**sections) for sections in OTHER_LAYOUTS[name])
    whole = two_ranks.run(first_half, first, tmp_path / "a")[0]
    resumed = two_ranks.run(second_half, second, tmp_path / "a", tmp_path / "b")[0]
    np.testing.assert_allclose(resumed, whole, atol=1e-5)


WIDE = {
    "tp2-dp2-zero1": dict(parallel=dict(tensor_parallel=2, zero_stage=1)),
    "tp2-dp2-zero3": dict(parallel=dict(tensor_parallel=2, zero_stage=3)),
    "tp4-padded": dict(parallel=dict(tensor_parallel=4), model=dict(n_kv_head=4)),
}


@pytest.mark.parametrize("name", slow_but([], WIDE))
def test_four_ranks_to_one(name: str, four_ranks: RankPool, one_rank: RankPool, tmp_path: Path) -> None:
    wide = case(**WIDE[name])
    whole = four_ranks.run(first_half, wide, tmp_path / "a")[0]
    exact = four_ranks.run(second_half, wide, tmp_path / "a", tmp_path / "c")[0]
    assert exact == whole
    resumed = one_rank.run(second_half, plain(wide, micro_batch_size=8), tmp_path / "a", tmp_path / "b")[0]
    np.testing.assert_allclose(resumed, whole, atol=1e-5)


def test_a_lost_moment_is_noticed(two_ranks: RankPool, tmp_path: Path) -> None:
    """The comparison above can fail: without Adam's moments the continuation differs."""
    config = case(parallel=dict(zero_stage=1))
    whole = two_ranks.run(first_half, config, tmp_path / "a")
    assert two_ranks.run(weights_only, config, tmp_path / "a") != whole


def weights_only(config: RunConfig, root: Path) -> list[float]:
    mesh = Mesh.create(config.parallel, "cpu")
    engine = build_engine(config, mesh, CPU)
    engine.load_pieces(open_checkpoint(root / "step-00000003"), 0)
    losses = steps(engine, config, mesh, 3, 3)
    engine.close()
    return losses


class Unreadable:
    """A source of which rank 1 alone cannot read its part."""

    def read_slice(self, name: str, kind: str, part: Slice) -> torch.Tensor:
        if dist.get_rank() == 1:
            raise CheckpointError("rank 1's part is damaged")
        return torch.ones(part.shape)


def load_unreadable(config: RunConfig) -> str:
    engine = build_engine(config, Mesh.create(config.parallel, "cpu"), CPU)
    try:
        engine.load_pieces(Unreadable(), 0)
    except CheckpointError as error:
        return str(error)
    finally:
        engine.close()
    return "no error"


LAYOUTS = {
    "tp2": dict(parallel=dict(tensor_parallel=2)),
    "zero3": dict(parallel=dict(zero_stage=3)),
    "fsdp": dict(parallel=dict(zero_stage=3), train=dict(engine="fsdp")),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_part_that_one_rank_cannot_read_stops_all(name: str, two_ranks: RankPool) -> None:
    assert two_ranks.run(load_unreadable, case(**LAYOUTS[name])) == ["rank 1's part is damaged"] * 2
