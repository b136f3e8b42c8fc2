"""The compiled gradient of the embedding on a GPU (`make test-gpu`)."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernels.embedding import case, tokens_of
from kernels.embedding import CHUNK, embedding
from rounding import DTYPES, GPU, GPU_ONLY, check, check_repeats_and_compiles

pytestmark = GPU_ONLY


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", [1, 40, 768, 1600, 4096])
@pytest.mark.parametrize(("N", "V"), [(1, 1), (CHUNK + 1, 1), (1000, 7), (8192, 50304)])
def test_embedding(N: int, V: int, C: int, dtype: torch.dtype) -> None:
    check(case(dtype, tokens_of(N, V).to(GPU), C, V), dtype)


def test_tokens_outside_of_the_table() -> None:
    tokens = tokens_of(5000, 300).to(GPU) * 3 - 300
    check(case(torch.bfloat16, tokens, 768, 300, zero_outside=True), torch.bfloat16)


def test_gradients_of_more_than_2_31_elements() -> None:
    """Of dy, and of the table."""
    C = 16_384
    for N, V in ((2**17 + 3, 5), (5, 2**17 + 3)):
        tokens = torch.arange(N, device="cuda") % V
        tokens[-1] = V - 1
        weight = torch.zeros(V, C, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        dy = torch.zeros(N, C, dtype=torch.bfloat16, device="cuda")
        dy[-1] = 1.0
        (ours,) = torch.autograd.grad(embedding(tokens, weight, impl="triton"), weight, dy)
        assert bool((ours[-1] == 1).all())
        assert ours[:-1].count_nonzero() == 0


def test_repeats_and_compiles_whole_and_runs_in_a_graph() -> None:
    tokens = tokens_of(20_000, 500).to(GPU)
    example = case(torch.bfloat16, tokens, 768, 500)
    check_repeats_and_compiles(example)
    (dy,) = example.gradients
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.ops.ingot.embedding_backward(dy, tokens, 500)
    graph.replay()
    assert torch.equal(captured, example.results("triton")[1])
