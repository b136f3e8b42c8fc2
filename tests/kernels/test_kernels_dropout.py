"""Dropout in one pass, against the masks in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels import philox
from kernels.dispatch import KernelError
from kernels.dropout import dropout, dropout_op
from kernels.philox import DropoutKey

KEY = DropoutKey(0.3, 2**32 - 5, 7)
SAMPLES = torch.tensor([2**40 + 3, 0, 2**32 - 1])


def arguments(T: int, C: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, residual, grad = (torch.randn(3, T, C).to(dtype) for _ in range(3))
    return x.requires_grad_(), residual.requires_grad_(), grad, torch.arange(T) * 7 + 100_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("T", "C"), [(1, 1), (5, 7), (9, 130), (2, 516), (0, 8)])
def test_the_same_bits_as_plain_pytorch_in_fp32(T: int, C: int, dtype: torch.dtype) -> None:
    x, residual, grad, positions = arguments(T, C, dtype)
    ours = dropout(x, KEY, SAMPLES, positions, residual=residual, impl="triton")
    plain = (residual.float() + philox.dropout(x.float(), KEY, SAMPLES, positions)).to(dtype)
    assert torch.equal(ours, plain)
    for mine, theirs in zip(*(torch.autograd.grad(o, (x, residual), grad) for o in (ours, plain)), strict=True):
        assert torch.equal(mine, theirs)
    alone = dropout(x, KEY, SAMPLES, positions, impl="triton")
    assert torch.equal(alone, philox.dropout(x, KEY, SAMPLES, positions))


def test_strides_and_expanded_gradients() -> None:
    x, residual, _, positions = arguments(6, 10)
    plain = dropout(x, KEY, SAMPLES, positions, residual=residual, impl="triton")
    wide = torch.stack([x, x], -1)[..., 0].transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(dropout(wide, KEY, SAMPLES, positions, residual=residual, impl="triton"), plain)
    (mine,) = torch.autograd.grad(plain.sum(), x)
    (theirs,) = torch.autograd.grad(philox.dropout(x, KEY, SAMPLES, positions).sum(), x)
    assert torch.equal(mine, theirs)


def test_opcheck_compile_and_recomputation() -> None:
    x, residual, grad, positions = arguments(6, 10)
    torch.library.opcheck(dropout_op, (x, residual, SAMPLES, positions, 0.3, 5, 7))
    torch.library.opcheck(dropout_op, (x, None, SAMPLES, positions, 0.3, 5, 7))

    def form(x: Tensor, residual: Tensor) -> Tensor:
        return dropout(x, KEY, SAMPLES, positions, residual=residual, impl="triton")

    expected = torch.autograd.grad(form(x, residual), (x, residual), grad)
    compiled = torch.compile(form, fullgraph=True, backend="aot_eager")
    for output in (compiled(x, residual), checkpoint(form, x, residual, use_reentrant=False)):
        for mine, theirs in zip(torch.autograd.grad(output, (x, residual), grad), expected, strict=True):
            assert torch.equal(mine, theirs)


def test_no_dropout_is_the_sum() -> None:
    x, residual, _, positions = arguments(3, 4)
    off = DropoutKey(0.0, 1, 1)
    assert dropout(x, off, SAMPLES, positions, impl="triton") is x
    assert torch.equal(dropout(x, off, SAMPLES, positions, residual=residual, impl="triton"), x + residual)


def test_an_unlike_residual_is_refused() -> None:
    x, residual, _, positions = arguments(3, 4)
    with pytest.raises(KernelError, match=r"found a residual that is not \(3, 3, 4\) of torch.float32"):
        dropout(x, KEY, SAMPLES, positions, residual=residual.bfloat16())
