"""The bench's measures are right where theory is exact, and its tables hold together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.layout.cost import (
    AS_IN_THEORY,
    State,
    activations,
    data_layouts,
    state_memory,
    state_theory,
    step_traffic,
    tensor_layouts,
)
from benchmarks.layout.tables import activation_table, layer_table, memory_table
from llm.config import RunConfig
from llm.parallel.mesh import Mesh
from pool import RankPool
from tiny_run import case

CPU = torch.device("cpu")
PARAMETERS = 2 * 12 + 3  # of BASE's model; Adam counts the steps of each, or of each flat group, in 4 bytes


def measured(config: RunConfig) -> tuple[State, State]:
    mesh = Mesh.create(config.parallel, "cpu")
    return state_memory(config, mesh, CPU), state_theory(config, mesh.world_size)


EXACT: dict[str, dict[str, Any]] = {
    "zero0": dict(parallel=dict(zero_stage=0)),
    "zero2-bf16": dict(parallel=dict(zero_stage=2), train=dict(precision="bf16")),
    "fsdp": dict(parallel=dict(zero_stage=3), train=dict(engine="fsdp")),
    "tp2-fsdp2-bf16": dict(parallel=dict(zero_stage=2, tensor_parallel=2), train=dict(engine="fsdp", precision="bf16")),
}


@pytest.mark.parametrize("name", EXACT)
def test_memory_of_the_state_is_what_theory_gives(name: str, four_ranks: RankPool) -> None:
    config = case(**EXACT[name], model=dict(vocab_size=64))
    for state, theory in four_ranks.run(measured, config):
        assert (state.weights, state.gradients) == (theory.weights, theory.gradients)
        assert 0 < state.moments - theory.moments <= 4 * PARAMETERS


def test_where_deepspeed_holds_more(four_ranks: RankPool) -> None:
    """Stage 3 allocates gradients and a bucket when it is built."""
    config = case(parallel=dict(zero_stage=3), model=dict(vocab_size=64))
    config = replace(config, deepspeed={"zero_optimization": AS_IN_THEORY})
    for state, theory in four_ranks.run(measured, config):
        buffers = theory.gradients + 4 * AS_IN_THEORY["reduce_bucket_size"]
        assert state.weights == theory.weights + buffers + 1  # a flag
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
    config = case(model=dict(n_kv_head=4))
    names = [name for name, _ in [*data_layouts(config), *tensor_layouts(config, 4)]]
    assert len(names) == len(set(names)) == 15
    assert "FSDP2 as ZeRO 3, bf16" in names and "TP 2 + SP x DP 2" in names and "ZeRO 0, bf16" not in names
    assert [name for name, _ in tensor_layouts(config, 2)] == ["TP 2", "TP 2 + SP"]


def tables(config: RunConfig) -> list[str]:
    mesh = Mesh.create(config.parallel, "cpu")
    assert step_traffic(config, mesh, CPU).payload
    return [table(config, CPU, 1) for table in (layer_table, activation_table, memory_table)]


@pytest.mark.slow
def test_the_tables_are_whole(two_ranks: RankPool) -> None:
    for layers, recomputed, memory in two_ranks.run(tables, case()):
        assert "| nn.Linear |" in layers and layers.count("\n") == 3
        assert "| full, every 2 blocks |" in recomputed and recomputed.count("\n") == 5
        assert "| ZeRO 3, bf16 |" in memory and memory.count("\n| ") == 12
