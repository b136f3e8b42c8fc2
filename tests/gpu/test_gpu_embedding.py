"""The compiled gradient of the embedding on a GPU (`make test-gpu`)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.embedding import CHUNK, embedding
from rounding import DTYPES, GPU_ONLY, assert_repeats, assert_within_rounding, run

pytestmark = GPU_ONLY


def inputs(N: int, V: int, C: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, of which few are frequent and most are rare, table and dy."""
    torch.manual_seed(0)
    tokens = (torch.rand(N, device="cuda") ** 4 * V).long()
    weight, dy = (torch.randn(rows, C, device="cuda").to(dtype) for rows in (V, N))
    return tokens, weight, dy


def form(tokens: Tensor, impl: str, **options: bool) -> Callable[[Tensor], Tensor]:
    return lambda weight: embedding(tokens, weight, impl=impl, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", [1, 40, 768, 1600, 4096])
@pytest.mark.parametrize(("N", "V"), [(1, 1), (CHUNK + 1, 1), (1000, 7), (8192, 50304)])
def test_embedding(N: int, V: int, C: int, dtype: torch.dtype) -> None:
    tokens, weight, dy = inputs(N, V, C, dtype)
    true = run(form(tokens, "reference"), [weight], dy, torch.float64)
    plain = run(form(tokens, "torch"), [weight], dy, dtype)
    assert_within_rounding(run(form(tokens, "triton"), [weight], dy, dtype), plain, true, dtype)


def test_tokens_outside_of_the_table() -> None:
    tokens, weight, dy = inputs(5000, 300, 768, torch.bfloat16)
    tokens = tokens * 3 - 300
    forms = [form(tokens, impl, zero_outside=True) for impl in ("triton", "torch", "reference")]
    ours, plain = (run(f, [weight], dy, torch.bfloat16) for f in forms[:2])
    assert_within_rounding(ours, plain, run(forms[2], [weight], dy, torch.float64), torch.bfloat16)


def test_embedding_gives_the_same_bits_every_time() -> None:
    tokens, weight, dy = inputs(20_000, 500, 768, torch.bfloat16)
    assert_repeats(lambda: run(form(tokens, "triton"), [weight], dy, torch.bfloat16))


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


def test_compiles_whole_and_runs_in_a_graph() -> None:
    tokens, weight, dy = inputs(3000, 100, 768, torch.bfloat16)
    eager = run(form(tokens, "auto"), [weight], dy, torch.bfloat16)
    compiled = torch.compile(form(tokens, "auto"), fullgraph=True)
    for mine, theirs in zip(run(compiled, [weight], dy, torch.bfloat16), eager, strict=True):
        assert torch.equal(mine, theirs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.ops.ingot.embedding_backward(dy, tokens, len(weight))
    graph.replay()
    assert torch.equal(captured, eager[1])
