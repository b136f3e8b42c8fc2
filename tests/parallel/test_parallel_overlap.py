"""The input gradient of a column-parallel layer travels while the weight gradient is computed: seen in a trace."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from llm.config import ParallelConfig
from llm.parallel import layers
from llm.parallel.layers import ColumnParallelLinear, TensorParallel
from llm.parallel.mesh import Mesh
from pool import RankPool

B, T, I, O = 2, 8, 16, 24  # noqa: E741


def backward_trace(sequence_parallel: bool, overlapped: bool = True) -> list[str]:
    """What the backward pass of one layer does, in the order in which it begins: collectives, waits, products."""
    tp = TensorParallel.of(Mesh.create(ParallelConfig(tensor_parallel=2), "cpu").tp_group, sequence_parallel)
    layer = ColumnParallelLinear(I, O, bias=False, tp=replace(tp))
    torch.nn.init.ones_(layer.weight)
    y = layer(torch.ones(B, T // (2 if sequence_parallel else 1), I, requires_grad=True))
    started = layers.start_reduce_scatter, layers.start_all_reduce_
    if not overlapped:
        layers.start_reduce_scatter, layers.start_all_reduce_ = (
            lambda *args, start=start: layers.wait(start(*args)) for start in started
        )
    try:
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
            y.backward(torch.ones_like(y))
    finally:
        layers.start_reduce_scatter, layers.start_all_reduce_ = started
    events = sorted(trace.events(), key=lambda event: event.time_range.start)
    return [name for event in events if (name := label(event))]


def label(event) -> str | None:
    if event.name == "aten::mm":
        # grad_y [BT, O/2] W -> input gradient; grad_y^T [O/2, BT] x -> weight gradient
        return "input gradient" if event.input_shapes[0] == [B * T, O // 2] else "weight gradient"
    return event.name.removeprefix("_c10d_functional::") if event.name.startswith("_c10d_functional::") else None


EXPECTED = {
    False: ["input gradient", "all_reduce_", "weight gradient", "wait_tensor"],
    True: [
        "all_gather_into_tensor",
        "input gradient",
        "reduce_scatter_tensor",
        "wait_tensor",  # for the gathered input
        "weight gradient",
        "wait_tensor",
    ],
}


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_started_before_and_waited_for_after_the_weight_gradient(sequence_parallel: bool, two_ranks: RankPool) -> None:
    for trace in two_ranks.run(backward_trace, sequence_parallel):
        assert trace == EXPECTED[sequence_parallel]


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_waiting_at_once_would_be_seen(sequence_parallel: bool, two_ranks: RankPool) -> None:
    for trace in two_ranks.run(backward_trace, sequence_parallel, False):
        assert trace != EXPECTED[sequence_parallel]
