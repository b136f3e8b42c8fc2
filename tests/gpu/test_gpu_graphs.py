"""Every kernel in a CUDA graph, forward and backward: nothing waits for the GPU, and a replay computes it all again."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from every_kernel import of_attention, of_rows, of_vocabulary

from benchmarks.kernels.case import Case
from rounding import GPU, GPU_ONLY

pytestmark = GPU_ONLY


def replayed(case: Case) -> list[torch.Tensor]:
    """The results of a graph of the case, of which nothing is left from the capture."""
    with torch.cuda.stream(torch.cuda.Stream()):
        case.results("triton")  # compiles, which a capture does not allow
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = case.results("triton")
    for result in results:
        result.detach().zero_()
    graph.replay()
    return results


@pytest.mark.parametrize("cases", [of_attention, of_rows, of_vocabulary])
def test_a_replay_gives_the_same_bits(cases) -> None:
    for case in chain(cases(GPU, torch.bfloat16), cases(GPU, torch.float32)):
        if "atomics" not in case.name:
            expected = [result.clone() for result in case.results("triton")]
            assert all(torch.equal(a, b) for a, b in zip(replayed(case), expected, strict=True)), case.name
