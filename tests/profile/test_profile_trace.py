"""Whose the time of a step is: of real traces of a tiny engine, and of made-up ones where times must be exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from profiled_step import Data, Taken, config, new_engine, ranges, step, taken
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from chosen import slow_but
from llm.model.parts import MODEL_PARTS
from llm.profile.costs import bytes_moved, matmul_flops
from llm.profile.ranges import PARTS
from llm.profile.record import Part
from llm.profile.trace import Analysis, analyse, overlap, union
from tiny_run import G, T, batches

ALONE = {"tp": 1, "dp": 1, "world": 1}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Taken:
    return taken(
        config(train=dict(activation_checkpointing="full")), tmp_path_factory.mktemp("trace"), record_shapes=True
    )


def by_name(found: Analysis) -> dict[str, Part]:
    return {part.name: part for part in found.parts}


def total(found: Analysis) -> float:
    return sum(part.forward_ms + part.backward_ms + part.recompute_ms for part in found.parts) + found.unattributed_ms


def test_the_parts_add_up_to_the_step(whole: Taken) -> None:
    found = analyse(whole.events, ALONE)
    assert total(found) == pytest.approx(whole.wall_ms, rel=0.03)
    assert found.unattributed_ms < 0.1 * whole.wall_ms
    assert [part.name for part in found.parts] == [*PARTS]


def test_every_part_of_the_model_has_its_passes(whole: Taken) -> None:
    parts = by_name(analyse(whole.events, ALONE))
    assert all(parts[name].forward_ms > 0 and parts[name].backward_ms > 0 for name in MODEL_PARTS)
    within_blocks = {*MODEL_PARTS} - {"embedding", "head_loss"}
    assert all(parts[name].recompute_ms > 0 for name in within_blocks)
    assert parts["embedding"].recompute_ms == parts["head_loss"].recompute_ms == 0
    assert all(parts[name].forward_ms > 0 for name in ("data", "gradients", "clip", "optimizer", "publish"))
    assert sum(part.device_ms for part in parts.values()) == 0


def test_flops_are_those_of_torchs_counter(whole: Taken) -> None:
    with FlopCounterMode(display=False) as counter:
        made = config(train=dict(activation_checkpointing="full"))
        new_engine(made).forward_backward(batches(made, 2, 0, 1, ragged=False), G * T)
    counts: dict[Any, int] = counter.get_flop_counts()["Global"]
    products = sum(flops for op, flops in counts.items() if "attention" not in str(op))
    found = analyse(whole.events, ALONE, attention_flops=1000.0)
    calls = 4 * 2  # micro-batches, layers: each forward twice, and backward
    parts = by_name(found)
    assert parts["attention"].flops == calls * (2 + 2.5) * 1000
    assert sum(part.flops for part in found.parts) - parts["attention"].flops == products
    assert all(parts[name].bytes > 0 for name in MODEL_PARTS)


def test_waits_are_named(whole: Taken) -> None:
    by_part = analyse(whole.events, ALONE).syncs
    count = sum(round(sync.count) for sync in by_part)
    assert {sync.where for sync in by_part} == {"none"}, by_part  # its loss is read behind the parts
    known = analyse(whole.events, ALONE, places=[f"a.py:{i}" for i in range(count)]).syncs
    assert sorted(sync.where for sync in known) == [f"a.py:{i}" for i in range(count)]
    assert analyse(whole.events, ALONE, places=["a.py:0"] * (count + 1)).syncs == by_part


@pytest.mark.parametrize("how", slow_but(["full"], ["none", "full", "selective"]))
def test_profiled_steps_compute_the_same_bits_and_leave_no_hook(how: str) -> None:
    made = config(train=dict(activation_checkpointing=how))
    engine, bare = new_engine(made), new_engine(made)
    data = Data(made)
    before = {**vars(engine)}.keys()
    with profile(activities=[ProfilerActivity.CPU]), ranges(engine, data) as open_ranges:
        losses = [step(engine, data, number) for number in range(2)]
    assert losses == [step(bare, Data(made), number) for number in range(2)]
    assert all(torch.equal(engine.local_weight(name), bare.local_weight(name)) for name in engine.parameters)
    assert vars(engine).keys() == before and vars(data).keys() == {"config"} and open_ranges.open == []
    modules = list(engine.model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._forward_hooks_always_called for m in modules)


def event(name: str, start: float, end: float, cat: str = "cpu_op", tid: int = 1, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "pid": 1, "tid": tid, "cat": cat, "name": name, "ts": start, "dur": end - start, "args": args}


STEP = [
    event("ingot/step 7", 0, 1000),
    event("ingot/forward_backward", 0, 900),
    event("ingot/model", 0, 300),
    event("ingot/block", 100, 300),
    event("ingot/qkv", 100, 200),
    event("aten::mm", 110, 190, **{"Sequence number": 5, "Input Dims": [[4, 8], [8, 2]], "Input type": ["float"] * 2}),
    event("aten::gelu", 210, 250, **{"Sequence number": 6, "Input Dims": [[4, 2]], "Input type": ["float"]}),
    event("autograd::engine::evaluate_function: MmBackward0", 400, 600, **{"Sequence number": 5, "Fwd thread id": 1}),
]


def test_what_follows_a_layer_and_its_backward_pass_are_the_layers() -> None:
    parts = by_name(analyse(STEP, ALONE))
    # 100 in its range, 100 after it within the block; the backward pass by its sequence number.
    assert (parts["qkv"].forward_ms, parts["qkv"].backward_ms) == pytest.approx((0.2, 0.2))
    assert parts["gradients"].forward_ms == pytest.approx(0.5)
    assert (parts["qkv"].flops, parts["qkv"].bytes) == (2 * 4 * 8 * 2, 4 * (32 + 16 + 8) + 4 * (8 + 8))
    assert analyse(STEP, ALONE).unattributed_ms == pytest.approx(0.1)  # after the engine


def test_a_gloo_collective_is_exposed_where_nothing_is_computed() -> None:
    gloo = event("gloo:all_reduce", 150, 700, "user_annotation", 9, **{"Input Dims": [[10]], "Input type": ["float"]})
    launch = [event("c10d::allreduce_", 120, 121, **{"Input Dims": [[[10]], [], []]}), gloo]
    found = analyse([*STEP, *launch], {"tp": 2, "dp": 3, "world": 6})
    (collective,) = found.collectives
    assert (collective.name, collective.group_size, collective.bytes) == ("all_reduce", 3, 40)
    # All but 150 to 190 and 210 to 250, when operations run.
    assert (collective.ms, collective.exposed_ms) == pytest.approx((0.55, 0.47))
    assert by_name(found)["collectives"].forward_ms + by_name(found)["collectives"].backward_ms == pytest.approx(0.471)
    assert total(found) == pytest.approx(1.0)
    ours = [event("_c10d_functional::all_reduce", 119, 125), *launch]
    assert analyse([*STEP, *ours], {"tp": 2, "dp": 3, "world": 6}).collectives[0].group_size == 2


def test_a_vote_is_exposed_only_where_it_is_waited_for() -> None:
    two = {"Input Dims": [[2]], "Input type": ["long int"]}
    votes = [
        event("ingot/vote", 910, 920),
        event("c10d::allreduce_", 912, 914, **{"Input Dims": [[[2]]]}),
        event("ingot/vote", 980, 990),
        event("gloo:all_reduce", 913, 985, "user_annotation", 9, **two),
    ]
    (collective,) = analyse([*STEP, *votes], {"tp": 2, "dp": 3, "world": 6}).collectives
    assert (collective.name, collective.group_size) == ("vote", 6)
    assert collective.exposed_ms == pytest.approx(0.012)


def test_a_kernel_belongs_to_the_part_that_launched_it() -> None:
    nccl = {"Group size": 4, "In msg nelems": 8}
    gpu = [
        event("cudaLaunchKernel", 120, 125, "cuda_runtime", correlation=1),
        event("sgemm", 200, 500, "kernel", 7, correlation=1),
        event("cudaLaunchKernel", 950, 955, "cuda_runtime", correlation=2),
        event("ncclDevKernel_AllReduce(x)", 400, 700, "kernel", 8, correlation=2, **nccl),
        event("cudaStreamSynchronize", 960, 970, "cuda_runtime", correlation=3),
    ]
    found = analyse([*STEP, *gpu], ALONE)
    parts = by_name(found)
    assert (parts["qkv"].device_ms, parts["collectives"].device_ms) == pytest.approx((0.3, 0.3))
    (collective,) = found.collectives
    assert (collective.group_size, collective.bytes) == (4, 32)
    assert (collective.ms, collective.exposed_ms) == pytest.approx((0.3, 0.2))
    assert (found.host.launches, found.host.gap_ms) == (2, pytest.approx(0.5))
    assert [(sync.where, sync.ms) for sync in found.syncs] == [("none", pytest.approx(0.01))]


def test_spans_are_joined_and_measured() -> None:
    joined = union([(5, 7), (0, 2), (1, 3)])
    assert joined == [(0, 3), (5, 7)]
    assert overlap(joined, 2, 6) == 2 and overlap(joined, 3, 5) == 0 and overlap([], 0, 9) == 0


def test_costs() -> None:
    assert matmul_flops("aten::bmm", [[3, 4, 5], [3, 5, 6]]) == 2 * 3 * 4 * 5 * 6
    assert matmul_flops("aten::add", [[3], [3]]) == 0
    assert bytes_moved("aten::add", [[3], [3], []], ["float", "float", "Scalar"]) == 36
    assert bytes_moved("aten::copy_", [[3], [3], []], ["c10::BFloat16", "float", "Scalar"]) == 18
    assert bytes_moved("aten::view", [[3], []], ["float", "ScalarList"]) == 0
    assert bytes_moved("aten::embedding", [[100, 8], [2, 3], []], ["float", "long int", ""]) == 2 * 6 * 8 * 4
    assert bytes_moved("aten::_foreach_mul_", [[[3], [4]], []], ["TensorList", "Scalar"]) == 28 + 16
