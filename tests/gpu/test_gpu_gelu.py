"""Compiled GELU on a GPU (`make test-gpu`), forward and backward."""

from __future__ import annotations

import pytest
import torch

from kernels.gelu import gelu
from rounding import DTYPES, GPU_ONLY, assert_repeats, assert_within_rounding, run

pytestmark = GPU_ONLY


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("F", [60, 513, 3072, 16384])
@pytest.mark.parametrize("rows", [1, 199, 4096])
def test_gelu(rows: int, F: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, dy = (torch.randn(rows, F, device="cuda").to(dtype) for _ in range(2))

    def form(impl: str):
        return lambda x: gelu(x, impl=impl)

    true = run(form("reference"), [x], dy, torch.float64)
    plain = run(form("torch"), [x], dy, dtype)
    assert_within_rounding(run(form("triton"), [x], dy, dtype), plain, true, dtype)
    strided = torch.cat([x, x], 1)[:, :F]
    assert torch.equal(form("triton")(strided), form("triton")(x))


def test_repeats_and_compiles_whole() -> None:
    x, dy = (torch.randn(1000, 1500, device="cuda").bfloat16() for _ in range(2))

    def function(x: torch.Tensor) -> torch.Tensor:
        return gelu(x, impl="triton")

    eager = run(function, [x], dy, torch.bfloat16)
    assert_repeats(lambda: run(function, [x], dy, torch.bfloat16))
    compiled = run(torch.compile(function, fullgraph=True), [x], dy, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(compiled, eager, strict=True))


def test_past_two_to_the_31_elements() -> None:
    rows, F = 2**17 + 3, 2**14 + 64
    x = torch.zeros(rows, F, device="cuda", dtype=torch.bfloat16)
    x[-1] = torch.randn(F, device="cuda")
    x.requires_grad_()
    y = gelu(x, impl="triton")
    (dx,) = torch.autograd.grad(y, x, torch.ones((), device="cuda", dtype=x.dtype).expand_as(y))
    last = x[-1:].detach().requires_grad_()
    expected = gelu(last, impl="triton")
    assert torch.equal(y[-1:], expected)
    assert torch.equal(dx[-1:], torch.autograd.grad(expected.sum(), last)[0])
    assert not y[:-1].any()
    assert (dx[:-1] == 0.5).all()
