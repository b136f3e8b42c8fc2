"""Compiled SwiGLU on a GPU (`make test-gpu`), forward and backward."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernels.activations import case
from kernels.swiglu import swiglu
from rounding import DTYPES, GPU, GPU_ONLY, check, check_repeats_and_compiles

pytestmark = GPU_ONLY


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("F", [60, 513, 2048, 11008])
@pytest.mark.parametrize("rows", [1, 199, 4096])
def test_swiglu(rows: int, F: int, dtype: torch.dtype) -> None:
    example = case(GPU, dtype, swiglu, rows, F)
    y, *_ = check(example, dtype)
    x = example.tensors[0]
    strided = torch.cat([x, x], 1)[:, : x.shape[1]]
    assert torch.equal(swiglu(strided, impl="triton"), y)


def test_repeats_and_compiles_whole() -> None:
    check_repeats_and_compiles(case(GPU, torch.bfloat16, swiglu, 1000, 1500))


def test_past_two_to_the_31_elements() -> None:
    rows, F = 2**17 + 3, 2**13 + 64
    x = torch.zeros(rows, 2 * F, device="cuda", dtype=torch.bfloat16)
    x[-1] = torch.randn(2 * F, device="cuda")
    x.requires_grad_()
    y = swiglu(x, impl="triton")
    (dx,) = torch.autograd.grad(y, x, torch.ones((), device="cuda", dtype=x.dtype).expand_as(y))
    last = x[-1:].detach().requires_grad_()
    expected = swiglu(last, impl="triton")
    assert torch.equal(y[-1:], expected)
    assert torch.equal(dx[-1:], torch.autograd.grad(expected.sum(), last)[0])
    assert not y[:-1].any()
    assert not dx[:-1].any()
