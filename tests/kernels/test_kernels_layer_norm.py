"""Layer norm: the Triton kernels and the stock operator against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels import reference
from kernels.dispatch import KernelError
from kernels.layer_norm import layer_norm, layer_norm_op

# Rows: one, fewer than a tile, several partial sums with a ragged last one. Widths: odd, and powers
# of two.
SHAPES = [(1, 2), (1, 16), (7, 40), (33, 64), (130, 33), (3, 5, 257), (2, 1, 4097)]


def inputs(shape: tuple[int, ...], bias: bool, dtype: torch.dtype = torch.float32) -> list[Any]:
    torch.manual_seed(0)
    C = shape[-1]
    x = torch.randn(shape) * 2 + 1
    tensors = [x, torch.rand(C) + 0.5, torch.randn(C) if bias else None]
    return [None if t is None else t.to(dtype).requires_grad_() for t in tensors]


def run(function, tensors: list[Any], dy: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The output and the gradient of each tensor."""
    copies = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    y = function(*copies)
    given = [c for c in copies if c is not None]
    return [y, *torch.autograd.grad(y, given, dy.to(y.dtype))]


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape: tuple[int, ...], bias: bool, impl: str) -> None:
    tensors, dy = inputs(shape, bias), torch.randn(shape)
    ours = run(lambda *a: layer_norm(*a, impl=impl), tensors, dy)
    oracle = run(reference.layer_norm, tensors, dy, torch.float64)
    for mine, theirs in zip(ours, oracle, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)


def test_the_reference_is_the_stock_operator_in_float64() -> None:
    tensors, dy = inputs((5, 9), bias=True, dtype=torch.float64), torch.randn(5, 9)
    stock = run(lambda *a: layer_norm(*a, impl="torch"), tensors, dy)
    for mine, theirs in zip(run(reference.layer_norm, tensors, dy), stock, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_round_only_the_results(dtype: torch.dtype) -> None:
    tensors, dy = inputs((9, 40), bias=True, dtype=dtype), torch.randn(9, 40).to(dtype)
    ours = run(lambda *a: layer_norm(*a, impl="triton"), tensors, dy)
    oracle = run(reference.layer_norm, tensors, dy, torch.float64)
    for mine, theirs in zip(ours, oracle, strict=True):
        assert mine.dtype == dtype
        half_ulp = torch.finfo(dtype).eps / 2
        torch.testing.assert_close(mine.double(), theirs, rtol=1.02 * half_ulp, atol=1e-5)


def test_16_bit_rows_with_fp32_weights() -> None:
    (x, *_), (_, weight, bias) = inputs((4, 16), True, torch.bfloat16), inputs((4, 16), True)
    outs = [run(lambda *a, i=i: layer_norm(*a, impl=i), [x, weight, bias], x) for i in ("triton", "reference")]
    for mine, theirs in zip(*outs, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-5)
    assert layer_norm(x, weight, bias, impl="torch").dtype == torch.bfloat16


def layouts(x: Tensor) -> dict[str, Tensor]:
    """Tensors equal to x with other strides."""
    return {
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "last dimension strided": torch.stack([x, x], -1).flatten(-2)[..., ::2],
        "rows of a wider tensor": torch.cat([x, x], -1)[..., : x.shape[-1]],
    }


@pytest.mark.parametrize("which", ["transposed", "last dimension strided", "rows of a wider tensor"])
def test_strides_change_nothing(which: str) -> None:
    x, weight, bias = inputs((3, 5, 12), bias=True)
    dy = torch.randn(3, 5, 12)
    plain = run(lambda *a: layer_norm(*a, impl="triton"), [x, weight, bias], dy)
    strided = layouts(x.detach())[which].requires_grad_()
    y = layer_norm(strided, weight, bias, impl="triton")
    ours = [y, *torch.autograd.grad(y, [strided, weight, bias], layouts(dy)[which])]
    for mine, theirs in zip(ours, plain, strict=True):
        assert torch.equal(mine, theirs)


def test_expanded_gradients() -> None:
    x, weight, bias = inputs((3, 5, 12), bias=True)
    for scale in (torch.tensor(0.5), torch.randn(12)):
        ours = run(lambda *a: layer_norm(*a, impl="triton"), [x, weight, bias], scale.expand(3, 5, 12))
        dense = run(reference.layer_norm, [x, weight, bias], scale.expand(3, 5, 12).contiguous())
        for mine, theirs in zip(ours, dense, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_opcheck() -> None:
    x, weight, bias = inputs((3, 5, 12), bias=True)
    torch.library.opcheck(layer_norm_op, (x, weight, bias, 1e-5))
    torch.library.opcheck(layer_norm_op, (x, weight, None, 1e-5))


def test_compiles_whole_and_recomputes() -> None:
    tensors, dy = inputs((3, 5, 12), bias=True), torch.randn(3, 5, 12)

    def twice(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return layer_norm(layer_norm(x, weight, bias, impl="triton"), weight, bias, impl="triton")

    eager = run(twice, tensors, dy)
    others = {
        "compiled": torch.compile(twice, fullgraph=True, backend="aot_eager"),
        "recomputed": lambda *a: checkpoint(twice, *a, use_reentrant=False),
    }
    for name, function in others.items():
        for mine, theirs in zip(run(function, tensors, dy), eager, strict=True):
            assert torch.equal(mine, theirs), name
    copies = [t.detach().requires_grad_() for t in tensors]
    checkpoint(twice, *copies, use_reentrant=True).backward(dy)
    for copy, theirs in zip(copies, eager[1:], strict=True):
        assert torch.equal(copy.grad, theirs)


def test_wrong_arguments_are_named() -> None:
    x = torch.zeros(2, 4)
    with pytest.raises(KernelError, match=r"expected \(4,\)"):
        layer_norm(x, torch.zeros(3), None)
    with pytest.raises(KernelError, match="float64, expected float32"):
        layer_norm(x.double(), torch.zeros(4), None, impl="triton")
    with pytest.raises(KernelError, match="found width 8193"):
        layer_norm(torch.zeros(1, 8193), torch.zeros(8193), None, impl="triton")
