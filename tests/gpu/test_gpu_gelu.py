"""Compiled GELU on a GPU (`make test-gpu`), forward and backward."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernels.activations import case
from kernels.gelu import gelu
from rounding import DTYPES, GPU, GPU_ONLY, check, check_repeats_and_compiles

pytestmark = GPU_ONLY


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("F", [60, 513, 3072, 16384])
@pytest.mark.parametrize("rows", [1, 199, 4096])
def test_gelu(rows: int, F: int, dtype: torch.dtype) -> None:
    example = case(GPU, dtype, gelu, rows, F)
    y, *_ = check(example, dtype)
    x = example.tensors[0]
    strided = torch.cat([x, x], 1)[:, : x.shape[1]]
    assert torch.equal(gelu(strided, impl="triton"), y)


def test_repeats_and_compiles_whole() -> None:
    check_repeats_and_compiles(case(GPU, torch.bfloat16, gelu, 1000, 1500))


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
