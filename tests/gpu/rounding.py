"""The rule that GPU tests judge by, FlashAttention's: the error against fp32 is at most twice that of plain PyTorch in
the kernel's own dtype, plus one rounding of the largest value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.kernels.case import Case
from kernels.dispatch import INTERPRETED

# `pytestmark = GPU_ONLY` in a file of GPU tests.
GPU_ONLY = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(INTERPRETED, reason="the kernels are interpreted: run `make test-gpu`"),
]
GPU = torch.device("cuda")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
REPEATS = 100  # of a deterministic kernel, which must give the same bits each time


def run(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], gradient: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """The output of `function` on copies of `tensors` in `dtype`, and the gradient of each."""
    copies = [t.detach().to(dtype).requires_grad_() for t in tensors]
    output = function(*copies)
    return [output, *torch.autograd.grad(output, copies, gradient.to(output.dtype))]


def assert_within_rounding(ours: list[Tensor], plain: list[Tensor], true: list[Tensor], dtype: torch.dtype) -> None:
    """ours: the kernel's results; plain: PyTorch's in `dtype`; true: in float64 (or fp32)."""
    for mine, theirs, exact in zip(ours, plain, true, strict=True):
        allowed = 2 * (theirs - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
        assert (mine - exact).abs().max() <= allowed


def assert_repeats(function: Callable[[], Sequence[Tensor]]) -> None:
    """`function` gives the same bits REPEATS times."""
    first = function()
    for _ in range(REPEATS):
        assert all(torch.equal(a, b) for a, b in zip(first, function(), strict=True))


def check(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """The kernels' results of a case in `dtype`, which are within rounding of the reference's in float64."""
    ours = case.results("triton", dtype)
    assert_within_rounding(ours, case.results("torch", dtype), case.results("reference", torch.float64), dtype)
    return ours


def check_repeats_and_compiles(case: Case) -> None:
    """The kernels give the same bits every time, and when Inductor compiles the call as a whole."""
    assert_repeats(lambda: case.results("triton"))
    compiled = replace(case, function=torch.compile(case.function, fullgraph=True))
    assert all(torch.equal(a, b) for a, b in zip(compiled.results("triton"), case.results("triton"), strict=True))
