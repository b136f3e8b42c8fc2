"""Compiled normalisation on a GPU (`make test-gpu`), alone and after the residual addition, forward and backward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.kernels.norm import KEY, case
from kernels import philox
from kernels.norm import add_layer_norm, layer_norm, rms_norm
from kernels.philox import DropoutKey
from rounding import DTYPES, GPU, GPU_ONLY, assert_repeats, check, run

pytestmark = GPU_ONLY
WIDTHS = [16, 192, 760, 768, 1024, 1600, 4096, 5120, 8192, 12000, 16384]


def drop(B: int, T: int, p: float) -> dict[str, Any]:
    samples, positions = torch.arange(B, device="cuda") + 2**33, torch.arange(T, device="cuda")
    return dict(dropout=DropoutKey(p, seed=3, site=2**32 - 1), samples=samples, positions=positions)


def weights(C: int) -> list[Tensor]:
    return [torch.rand(C, device="cuda") + 0.5, torch.randn(C, device="cuda")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "bias"), [("layer_norm", True), ("layer_norm", False), ("rms_norm", False)])
@pytest.mark.parametrize("C", WIDTHS)
@pytest.mark.parametrize("rows", [1, 199, 8192])
def test_norm(rows: int, C: int, op: str, bias: bool, dtype: torch.dtype) -> None:
    check(case(GPU, dtype, op, rows if rows * C <= 2**27 else 1024, C, bias=bias), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("C", WIDTHS)
@pytest.mark.parametrize(("B", "T"), [(1, 1), (3, 67), (2, 1024)])
def test_added_norm(B: int, T: int, C: int, p: float, dtype: torch.dtype) -> None:
    for op in ("add_layer_norm", "add_rms_norm"):
        check(case(GPU, dtype, op, B, T, C, dropout=replace(KEY, p=p)), dtype)


@pytest.mark.parametrize("C", WIDTHS)
def test_the_stream_has_the_bits_of_the_unfused_sum(C: int) -> None:
    torch.manual_seed(0)
    what = drop(2, 64, 0.3)
    x, residual = (torch.randn(2, 64, C, device="cuda") for _ in range(2))
    y, stream = add_layer_norm(x, residual, *weights(C), **what, impl="triton")
    assert torch.equal(stream, residual + philox.dropout(x, *what.values()))
    x, residual, (weight, bias) = x.bfloat16(), residual.bfloat16(), weights(C)
    y, stream = add_layer_norm(x, residual, weight, bias, **what, impl="triton")
    assert torch.equal(y, layer_norm(stream, weight, bias, impl="triton"))


@pytest.mark.parametrize("C", [768, 4096, 16384])
def test_the_same_bits_each_time(C: int) -> None:
    example = case(GPU, torch.bfloat16, "add_layer_norm", 4, 512, C, dropout=KEY)
    assert_repeats(lambda: example.results("triton"))


@pytest.mark.parametrize("C", [4096, 16384])
def test_more_than_2_to_the_31_elements(C: int) -> None:
    rows = 2**31 // C + 3
    x = torch.zeros(rows, C, device="cuda", dtype=torch.bfloat16)
    x[-3:] = torch.randn(3, C, device="cuda").bfloat16()
    weight = weights(C)[0]
    leaf, tail = x.requires_grad_(), x[-3:].detach().requires_grad_()
    y, tail_y = rms_norm(leaf, weight, impl="triton"), rms_norm(tail, weight, impl="triton")
    assert torch.equal(y[-3:], tail_y)
    dy = torch.randn(3, C, device="cuda").bfloat16()
    (tail_dx,) = torch.autograd.grad(tail_y, tail, dy)
    whole = torch.zeros_like(y)
    whole[-3:] = dy
    (dx,) = torch.autograd.grad(y, leaf, whole)
    assert torch.equal(dx[-3:], tail_dx)


def test_compiles_whole() -> None:
    x, residual, dy = (torch.randn(2, 300, 768, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    tensors, what = [x, residual, *(w.bfloat16() for w in weights(768))], drop(2, 300, 0.1)

    def twice(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y, stream = add_layer_norm(x, residual, weight, bias, **what, impl="triton")
        return rms_norm(y + stream, weight, impl="triton")

    eager = run(twice, tensors, dy, torch.bfloat16)
    compiled = run(torch.compile(twice, fullgraph=True), tensors, dy, torch.bfloat16)
    for mine, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)
