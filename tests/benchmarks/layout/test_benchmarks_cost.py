"""The bench's measures are right where theory is exact, and its tables hold together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.layout.cost import (
    AS_IN_THEORY,
    activation_table,
    activations,
    data_layouts,
    memory_table,
    state_memory,
)
from chosen import slow_but
from llm.config import RunConfig
from llm.parallel.mesh import Mesh
from llm.plan.memory import TrainingState, training_state
from pool import RankPool
from tiny_run import case

CPU = torch.device("cpu")
PARAMETERS = 2 * 12 + 3  # of BASE's model; Adam counts the steps of each, or of each flat group, in 4 bytes


def measured(config: RunConfig) -> tuple[TrainingState, TrainingState]:
    mesh = Mesh.create(config.parallel, "cpu")
    return state_memory(config, mesh, CPU), training_state(config, mesh.world_size)


EXACT: dict[str, dict[str, Any]] = {
    "zero0": dict(parallel=dict(zero_stage=0)),
    "zero2-bf16": dict(parallel=dict(zero_stage=2), train=dict(precision="bf16")),
    "fsdp": dict(parallel=dict(zero_stage=3), train=dict(engine="fsdp")),
    "tp2-fsdp2-bf16": dict(parallel=dict(zero_stage=2, tensor_parallel=2), train=dict(engine="fsdp", precision="bf16")),
}


@pytest.mark.parametrize("name", slow_but([], EXACT))
def test_memory_of_the_state_is_what_theory_gives(name: str, four_ranks: RankPool) -> None:
    config = case(**EXACT[name], model=dict(vocab_size=64))
    count = 8 * (config.train.engine == "deepspeed")  # the updates made, on the device
    for state, theory in four_ranks.run(measured, config):
        assert (state.weights, state.gradients) == (theory.weights + count, theory.gradients)
        judged = 5  # whether the step is left out, as a flag and as the optimizer has it
        assert 0 < state.moments - theory.moments <= 4 * PARAMETERS + judged


@pytest.mark.slow
def test_where_deepspeed_holds_more(four_ranks: RankPool) -> None:
    """Stage 3 allocates gradients and a bucket when it is built."""
    config = case(parallel=dict(zero_stage=3), model=dict(vocab_size=64))
    config = replace(config, deepspeed={"zero_optimization": AS_IN_THEORY})
    for state, theory in four_ranks.run(measured, config):
        buffers = theory.gradients + 4 * AS_IN_THEORY["reduce_bucket_size"]
        assert state.weights == theory.weights + buffers + 1 + 8  # a flag, and the updates made
        assert state.gradients == 0


def test_what_recomputation_holds() -> None:
    config = case(model=dict(n_layer=4))
    costs = activations(config, CPU, rounds=1)
    none, selective, half, full = (costs[key] for key in (("none", 1), ("selective", 1), ("full", 2), ("full", 1)))
    assert full.held < selective.held < none.held and half.held - full.held == (none.held - full.held) // 2
    assert full.peak <= half.peak < none.peak and selective.peak < none.peak
    model, tokens = config.model, config.train.micro_batch_size * config.data.seq_len
    # What enters each block and the last norm and leaves it (as gradient), the last norm's two statistics per token,
    # the gradient of the head, which is computed with the loss, and the loss.
    streams = (model.n_layer + 2) * tokens * model.d_model
    assert full.held == 4 * (streams + 2 * tokens + model.vocab_size * model.d_model + 1)


def test_the_layouts_of_the_tables() -> None:
    names = [name for name, _ in data_layouts(case())]
    assert len(names) == len(set(names)) == 11
    assert "FSDP2 as ZeRO 3, bf16" in names and "ZeRO 0, bf16" not in names


def tables(config: RunConfig) -> list[list[str]]:
    return [table(config, CPU, 1) for table in (activation_table, memory_table)]


@pytest.mark.slow
def test_the_tables_are_complete(two_ranks: RankPool) -> None:
    for recomputed, memory in two_ranks.run(tables, case()):
        assert recomputed[4].startswith("| full, every 2 blocks |") and len(recomputed) == 6
        assert any(line.startswith("| ZeRO 3, bf16 |") for line in memory)
        assert sum(line.startswith("| ") for line in memory) == 12
