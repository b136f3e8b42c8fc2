"""Compiled bias and GELU on a GPU (`make test-gpu`), forward and backward."""

from __future__ import annotations

import pytest
import torch

from kernels.gelu import bias_gelu
from rounding import DTYPES, GPU_ONLY, assert_repeats, assert_within_rounding, run

pytestmark = GPU_ONLY


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("F", [60, 513, 3072, 16384])
@pytest.mark.parametrize("rows", [1, 199, 4096])
def test_bias_gelu(rows: int, F: int, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, dy = (torch.randn(rows, F, device="cuda").to(dtype) for _ in range(2))
    tensors = [x, torch.randn(F, device="cuda").to(dtype)] if bias else [x]

    def form(impl: str):
        return lambda x, bias=None: bias_gelu(x, bias, impl=impl)

    true = run(form("reference"), tensors, dy, torch.float64)
    plain = run(form("torch"), tensors, dy, dtype)
    assert_within_rounding(run(form("triton"), tensors, dy, dtype), plain, true, dtype)
    strided = torch.cat([x, x], 1)[:, :F]
    assert torch.equal(form("triton")(strided, *tensors[1:]), form("triton")(*tensors))


@pytest.mark.parametrize("bias", [False, True])
def test_repeats_and_compiles_whole(bias: bool) -> None:
    x, dy = (torch.randn(1000, 1500, device="cuda").bfloat16() for _ in range(2))
    tensors = [x, torch.randn(1500, device="cuda")] if bias else [x]

    def function(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return bias_gelu(x, bias, impl="triton")

    eager = run(function, tensors, dy, torch.bfloat16)
    assert_repeats(lambda: run(function, tensors, dy, torch.bfloat16))
    compiled = run(torch.compile(function, fullgraph=True), tensors, dy, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(compiled, eager, strict=True))


@pytest.mark.parametrize("bias", [False, True])
def test_past_two_to_the_31_elements(bias: bool) -> None:
    rows, F = 2**17 + 3, 2**14 + 64
    x = torch.zeros(rows, F, device="cuda", dtype=torch.bfloat16)
    x[-1] = torch.randn(F, device="cuda")
    x.requires_grad_()
    b = torch.zeros(F, device="cuda", dtype=torch.bfloat16) if bias else None
    y = bias_gelu(x, b, impl="triton")
    (dx,) = torch.autograd.grad(y, x, torch.ones((), device="cuda", dtype=x.dtype).expand_as(y))
    last = x[-1:].detach().requires_grad_()
    expected = bias_gelu(last, b, impl="triton")
    assert torch.equal(y[-1:], expected)
    assert torch.equal(dx[-1:], torch.autograd.grad(expected.sum(), last)[0])
    assert not y[:-1].any()
    assert (dx[:-1] == 0.5).all()
