"""Bytes sent are counted right where the answer is known, and a step sends what the formulas say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional
from torch.distributed.tensor import DTensor, Shard

from chosen import slow_but
from llm.config import ParallelConfig, RunConfig
from llm.parallel.collectives import all_reduce, f, g, gather_sequence
from llm.parallel.mesh import Mesh
from llm.train.build import build_engine
from pool import RankPool
from tiny_run import batches, case, target_count
from traffic_count import Traffic, Volume
from traffic_theory import Collective, payload

pytestmark = pytest.mark.ranks

GATHER, SCATTER = Collective("all_gather", 2), Collective("reduce_scatter", 2)
REDUCE = Collective("all_reduce", 2)


def calls(name: str) -> dict[Collective, Volume]:
    """What is counted of one call with 10 fp32 elements on each of two ranks."""
    mesh = Mesh.create(ParallelConfig(tensor_parallel=2), "cpu")
    group, x, y = mesh.tp_group, torch.ones(10), torch.ones(20)
    actions = {
        "all_reduce": lambda: dist.all_reduce(x),
        "async": lambda: dist.all_reduce(x, async_op=True).wait(),  # pyright: ignore[reportOptionalMemberAccess]
        "all_gather": lambda: dist.all_gather([torch.ones(10), torch.ones(10)], x),
        "all_gather_into": lambda: dist.all_gather_into_tensor(y, x, group=group),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(x, y, group=group),
        "broadcast": lambda: dist.broadcast(x, src=0),
        "reduce": lambda: dist.reduce(x, dst=0),
        "functional": lambda: functional.all_reduce(x, "sum", group).sum(),
        "functional gather": lambda: functional.all_gather_tensor(x, 0, group).sum(),
        "functional scatter": lambda: functional.reduce_scatter_tensor(y, "sum", 0, group).sum(),
        "ours": lambda: all_reduce(x, "sum", group.group_name),
        "barrier": lambda: dist.barrier(),
        "backward of f": lambda: f(x.requires_grad_(), group.group_name).sum().backward(),
        "g": lambda: g(x.requires_grad_(), group.group_name).sum().backward(),
        "sequence": lambda: gather_sequence(x.view(1, 10, 1).requires_grad_(), 2, group.group_name).sum().backward(),
        # Sent from within an operator of DTensor.
        "dtensor": lambda: DTensor.from_local(x, mesh.devices["tp"], [Shard(0)]).softmax(dim=0),
        "alone": lambda: dist.all_reduce(x, group=mesh.dp_group),
    }
    with Traffic() as traffic:
        actions[name]()
    return traffic.volumes


KNOWN: dict[str, dict[Collective, Volume]] = {
    "all_reduce": {REDUCE: Volume(1, 40)},
    "async": {REDUCE: Volume(1, 40)},
    "all_gather": {GATHER: Volume(1, 80)},
    "all_gather_into": {GATHER: Volume(1, 80)},
    "reduce_scatter": {SCATTER: Volume(1, 80)},
    "broadcast": {Collective("broadcast", 2): Volume(1, 40)},
    "reduce": {Collective("reduce", 2): Volume(1, 40)},
    "functional": {REDUCE: Volume(1, 40)},
    "functional gather": {GATHER: Volume(1, 80)},
    "functional scatter": {SCATTER: Volume(1, 80)},
    "ours": {REDUCE: Volume(1, 40)},
    "barrier": {},
    "backward of f": {REDUCE: Volume(1, 40)},
    "g": {REDUCE: Volume(1, 40)},
    "sequence": {GATHER: Volume(1, 80), SCATTER: Volume(1, 80)},
    "dtensor": {GATHER: Volume(1, 80)},
    "alone": {},
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_collective_is_counted_once(name: str, two_ranks: RankPool) -> None:
    assert two_ranks.run(calls, name) == [KNOWN[name]] * 2


def unknown_and_scalar() -> tuple[str, Volume]:
    with Traffic() as traffic:
        dist.all_reduce(torch.ones((), dtype=torch.float64))
        with pytest.raises(NotImplementedError) as refused:
            dist.all_to_all_single(torch.ones(2), torch.ones(2))
    return str(refused.value), traffic.scalars


def test_scalars_are_apart_and_an_unknown_operator_is_refused(two_ranks: RankPool) -> None:
    for message, scalars in two_ranks.run(unknown_and_scalar):
        assert "alltoall_base_" in message and scalars == Volume(1, 8)


def test_what_rings_send() -> None:
    assert Collective("all_reduce", 4).ring_factor == 1.5
    assert GATHER.ring_factor + SCATTER.ring_factor == REDUCE.ring_factor == 1.0


LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "tp2": dict(parallel=dict(tensor_parallel=2)),
        "tp2-untied-learned": dict(
            parallel=dict(tensor_parallel=2), model=dict(tie_embeddings=False, position="learned")
        ),
        "tp2-full": dict(parallel=dict(tensor_parallel=2), train=dict(activation_checkpointing="full")),
        "tp2-bf16": dict(parallel=dict(tensor_parallel=2, zero_stage=1), train=dict(precision="bf16")),
        "sp2": dict(parallel=dict(tensor_parallel=2, sequence_parallel=True), model=dict(position="learned")),
        "sp2-every-2nd-rms-bf16": dict(
            parallel=dict(tensor_parallel=2, sequence_parallel=True, zero_stage=1),
            train=dict(activation_checkpointing="full", checkpoint_every=2, precision="bf16"),
            model=dict(n_layer=3, norm="rmsnorm", activation="swiglu", bias=False),
        ),
        "sp2-selective": dict(
            parallel=dict(tensor_parallel=2, sequence_parallel=True), train=dict(activation_checkpointing="selective")
        ),
        **{f"dp2-zero{stage}": dict(parallel=dict(zero_stage=stage)) for stage in range(4)},
        **{
            f"dp2-zero{stage}-bf16": dict(parallel=dict(zero_stage=stage), train=dict(precision="bf16"))
            for stage in (1, 2, 3)
        },
        "dp2-plain": dict(train=dict(engine="plain")),
        "dp2-fsdp2": dict(parallel=dict(zero_stage=2), train=dict(engine="fsdp")),
        "dp2-fsdp3-bf16": dict(parallel=dict(zero_stage=3), train=dict(engine="fsdp", precision="bf16")),
    },
    4: {
        "tp4": dict(parallel=dict(tensor_parallel=4)),
        "sp4": dict(parallel=dict(tensor_parallel=4, sequence_parallel=True)),
        "dp4-zero2": dict(parallel=dict(zero_stage=2)),
        "sp2-dp2-zero3": dict(parallel=dict(tensor_parallel=2, sequence_parallel=True, zero_stage=3)),
        "tp2-dp2-zero1": dict(parallel=dict(tensor_parallel=2, zero_stage=1)),
        "tp2-dp2-fsdp3": dict(parallel=dict(tensor_parallel=2, zero_stage=3), train=dict(engine="fsdp")),
    },
}
CASES = [(ranks, name) for ranks, layouts in LAYOUTS.items() for name in layouts]
FAST = [
    *((2, name) for name in ("tp2-bf16", "sp2-every-2nd-rms-bf16", "dp2-zero1", "dp2-zero3-bf16", "dp2-fsdp2")),
    *((4, name) for name in ("sp4", "sp2-dp2-zero3", "tp2-dp2-fsdp3")),
]


def layout(ranks: int, name: str) -> RunConfig:
    """Of a model whose parameters need no padding: the formulas do not have it."""
    sections = LAYOUTS[ranks][name]
    return case(**sections | {"model": dict(n_kv_head=4, vocab_size=64) | sections.get("model", {})})


def sent_in_a_step(config: RunConfig) -> dict[Collective, int]:
    mesh = Mesh.create(config.parallel, "cpu")
    engine = build_engine(config, mesh, torch.device("cpu"))
    traffic = Traffic()
    for step in range(2):
        traffic = Traffic()  # of the last step: DeepSpeed's ZeRO 3 traces the first one
        with traffic:
            engine.set_lr(config.optim.lr)
            engine.forward_backward(batches(config, step, mesh.dp_rank, mesh.dp_size, False), target_count(False))
            engine.step()
    engine.close()
    assert traffic.scalars.calls <= 6, traffic.scalars
    return traffic.payload


@pytest.mark.parametrize(("ranks", "name"), slow_but(FAST, CASES, several=True))
def test_a_step_sends_what_the_formulas_say(ranks: int, name: str, request: pytest.FixtureRequest) -> None:
    pool: RankPool = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[ranks])
    config = layout(ranks, name)
    for sent in pool.run(sent_in_a_step, config):
        assert sent == dict(payload(config, ranks))
