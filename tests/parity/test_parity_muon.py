"""Muon beyond the matrix of layouts: parts of matrices at a time, and faults that `verify` finds.

The oracle runs the same code on rank 0 in one process. So these faults are of what only several ranks do; those of one
matrix are compared with torch's Muon (tests/train/test_train_muon.py).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from chosen import slow_but
from llm.config import RunConfig
from llm.config.matrices import moments_of
from llm.parallel.mesh import Mesh
from llm.train import muon
from llm.train.build import build_engine
from llm.train.muon import Muon, Part, Plan, orthogonalised
from matrix import verified
from pool import RankPool
from test_train_restart import steps
from tiny_run import case

pytestmark = pytest.mark.ranks
MUON = dict(name="muon")
BF16, LLAMA = dict(precision="bf16"), dict(norm="rmsnorm", activation="swiglu", bias=False)
LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": dict(train=dict(engine="plain")),
    "fsdp": dict(parallel=dict(zero_stage=3), train=dict(engine="fsdp"), model=LLAMA),
    "zero1-tp2": dict(parallel=dict(zero_stage=1, tensor_parallel=2), train=BF16, model=LLAMA),
    "zero1": dict(parallel=dict(zero_stage=1)),
    "zero2-bf16": dict(parallel=dict(zero_stage=2), train=BF16),
    "zero3": dict(parallel=dict(zero_stage=3), model=LLAMA),
    "zero3-sub-groups": dict(parallel=dict(zero_stage=3), model=LLAMA),
    "lstm": dict(
        train=dict(engine="fsdp"),
        parallel=dict(zero_stage=2),
        model=dict(family="lstm", n_kv_head=None, position="learned"),
    ),
}


def config_of(layout: str) -> RunConfig:
    """zero3-sub-groups: so small that each calls the optimizer for a few matrices."""
    config = case(optim=MUON, **LAYOUTS[layout])
    if layout == "zero3-sub-groups":
        zero = config.deepspeed["zero_optimization"]
        config = replace(config, deepspeed={"zero_optimization": zero | {"sub_group_size": 1500}})
    return config


@pytest.mark.parametrize("layout", slow_but(["plain", "fsdp", "zero1-tp2"], LAYOUTS))
def test_no_layout_changes_the_result(layout: str, two_ranks: RankPool) -> None:
    reports = two_ranks.run(verified, config_of(layout), 3)
    assert reports[0].failures == []
    assert all(report.passed for report in reports)
    moments = {check.name for check in reports[0].of("exp_avg")} - {c.name for c in reports[0].of("exp_avg_sq")}
    assert moments == {c.name for c in reports[0].of("weight") if len(moments_of(c.name, config_of(layout).optim)) == 1}


def calls_of(config: RunConfig) -> list[int]:
    """How many matrices each call of a step has, on this rank. Collective."""
    engine = build_engine(config, Mesh.create(config.parallel, "cpu"), torch.device("cpu"))
    mesh = Mesh.create(config.parallel, "cpu")
    steps(engine, config, mesh, 0, 2)
    found = [len(plan.local) for plan in engine.optimizer.plans.values()]
    engine.close()
    return found


@pytest.mark.slow
def test_sub_groups_are_calls_of_their_own(two_ranks: RankPool) -> None:
    for calls in two_ranks.run(calls_of, config_of("zero3-sub-groups")):
        assert len(calls) > 2 and sum(calls) == 8


# Faults.


def iterations_of_a_slice() -> AbstractContextManager:
    """Each rank orthogonalises what it holds."""

    def alone(self: Muon, plan: Plan) -> list[tuple[Part, Tensor]]:
        found = []
        for part in (part for row in plan.returned for part in row[self.rank]):
            each = plan.local[part.name]
            mean = each.of(each.flat.grad).lerp(each.of(self.state[each.flat]["exp_avg"]), self.momentum).to(self.dtype)
            found.append((part, orthogonalised(mean.view(part.slice.shape)).flatten()))
        return found

    honest = Muon._orthogonalised
    return patch.object(
        Muon, "_orthogonalised", lambda self, plan: (honest if self.group is None else alone)(self, plan)
    )


def matrix_left_out() -> AbstractContextManager:
    """Rank 1 sends wide matrices back as they came."""
    honest = muon.orthogonalise_

    def left_out(weight: Tensor, sizes: Any) -> None:
        if weight.shape[0] >= weight.shape[1]:
            honest(weight, sizes)

    return patch.object(muon, "orthogonalise_", left_out) if dist.get_rank() == 1 else nullcontext()


def momentum_of_the_wrong_shard() -> AbstractContextManager:
    """The owner takes the parts of the two ranks for one another's."""
    honest = muon.transfers

    def swapped(held: Any, owner: Any, world: int) -> Any:
        exchanged = {
            name: {rank: parts.get(1 - rank, part) for rank, part in parts.items()} for name, parts in held.items()
        }
        return [honest(exchanged if world == 2 else held, owner, world)[0], honest(held, owner, world)[1]]

    return patch.object(muon, "transfers", swapped)


def scale_of_the_slice() -> AbstractContextManager:
    honest = muon.factor
    return patch.object(
        muon, "factor", lambda weight, sizes: honest((weight[0] // 2, weight[1]), sizes)
    ) if dist.get_rank() == 1 else nullcontext()  # fmt: skip


FAULTS: dict[str, tuple[Callable[[], AbstractContextManager], str, str]] = {
    "slice-tp2": (iterations_of_a_slice, "zero1-tp2", "blocks.0.up.weight weight, step 1"),
    "left-out": (matrix_left_out, "plain", "down.weight weight"),
    "left-out-fsdp": (matrix_left_out, "fsdp", "down.weight weight"),
    "wrong-shard": (momentum_of_the_wrong_shard, "fsdp", "blocks.0.qkv.weight weight, step 1"),
    "scale": (scale_of_the_slice, "fsdp", "up.weight weight"),
}


def mutated(fault: str) -> tuple[bool, list[str]]:
    applied, layout, _ = FAULTS[fault]
    with applied():
        report = verified(config_of(layout))
    return report.passed, report.failures


@pytest.mark.parametrize("fault", slow_but(["left-out", "wrong-shard"], FAULTS))
def test_a_fault_is_found_and_named(fault: str, two_ranks: RankPool) -> None:
    results = two_ranks.run(mutated, fault)
    assert not any(passed for passed, _ in results)
    named = FAULTS[fault][2]
    assert any(named in failure for failure in results[0][1]), results[0][1]
    with_moments = [f for f in results[0][1] if "exp_avg" in f and "step 1" in f]
    assert not with_moments, "the momentum is what it was"
