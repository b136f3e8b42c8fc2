"""GELU: the Triton kernels and the stock operator against the reference in float64."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.dispatch import KernelError
from kernels.gelu import gelu, gelu_backward_op, gelu_op, gelu_reference

# Of exp in the interpreter; infinity is right there.
pytestmark = pytest.mark.filterwarnings("ignore:overflow")
# One element, odd widths, several column tiles, many row tiles, none at all.
SHAPES = [(1,), (1, 3), (7, 14), (2, 3, 1031), (2, 1, 4100), (2, 0, 4), (0, 8), (4136, 33)]


def run(function, x: Tensor, dy: Tensor) -> list[Tensor]:
    """The output and the gradient of x."""
    x = x.detach().requires_grad_()
    y = function(x)
    return [y, *torch.autograd.grad(y, x, dy.to(y.dtype))]


def form(impl: str) -> Any:
    return lambda x: gelu(x, impl=impl)


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    torch.manual_seed(0)
    x, dy = torch.randn(shape) * 2, torch.randn(shape)
    return x.to(dtype), dy.to(dtype)


def in_float64(x: Tensor, dy: Tensor) -> list[Tensor]:
    return run(gelu_reference, x.double(), dy)


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape: tuple[int, ...], impl: str) -> None:
    tensors = inputs(shape)
    for mine, theirs in zip(run(form(impl), *tensors), in_float64(*tensors), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)


def test_the_reference_is_the_stock_operator_and_has_its_gradient() -> None:
    x, dy = inputs((5, 9), torch.float64)
    for mine, theirs in zip(run(gelu_reference, x, dy), run(form("torch"), x, dy), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert torch.autograd.gradcheck(gelu_reference, x.requires_grad_())


def test_the_stock_form_is_the_models_own_to_the_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, dy = inputs((2, 5, 12), dtype)
        theirs = run(lambda x: F.gelu(x, approximate="tanh"), x, dy)
        for mine, other in zip(run(gelu, x, dy), theirs, strict=True):
            assert torch.equal(mine, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_round_only_the_results(dtype: torch.dtype) -> None:
    tensors = inputs((40, 70), dtype)
    for mine, theirs in zip(run(form("triton"), *tensors), in_float64(*tensors), strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), theirs, rtol=1.02 * torch.finfo(dtype).eps / 2, atol=1e-5)


def test_large_inputs_do_not_overflow() -> None:
    tensors = torch.tensor([[-1e4, -20.0, 20.0, 1e4]]), torch.ones(1, 4)
    for mine, theirs in zip(run(form("triton"), *tensors), in_float64(*tensors), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-6, atol=1e-30)


def test_the_slope_keeps_its_last_bits_where_the_sigmoid_is_near_one() -> None:
    x = torch.linspace(-8, 8, 2001)[None]
    dx = run(form("triton"), x, torch.ones_like(x))[1]
    exact = in_float64(x, torch.ones_like(x))[1]
    assert (dx - exact).abs().max() < 7e-7


def layouts(x: Tensor) -> dict[str, Tensor]:
    """Tensors equal to x with other strides."""
    return {
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "last dimension strided": torch.stack([x, x], -1).flatten(-2)[..., ::2],
        "rows of a wider tensor": torch.cat([x, x], -1)[..., : x.shape[-1]],
    }


@pytest.mark.parametrize("which", ["transposed", "last dimension strided", "rows of a wider tensor"])
def test_strides_change_nothing(which: str) -> None:
    x, dy = inputs((3, 5, 12))
    plain = run(form("triton"), x, dy)
    for given, gradient in ((layouts(x)[which], dy), (x, layouts(dy)[which]), (layouts(x)[which], layouts(dy)[which])):
        ours = run(form("triton"), given, gradient)
        for mine, theirs in zip(ours, plain, strict=True):
            assert torch.equal(mine, theirs)


def test_expanded_gradients() -> None:
    x, _ = inputs((3, 5, 12))
    for scale in (torch.tensor(0.5), torch.randn(12)):
        ours = run(form("triton"), x, scale.expand(3, 5, 12))
        dense = run(form("triton"), x, scale.expand(3, 5, 12).contiguous())
        for mine, theirs in zip(ours, dense, strict=True):
            assert torch.equal(mine, theirs)


def test_random_shapes() -> None:
    draw = random.Random(0)
    for _ in range(12):
        M, width = draw.randint(1, 90), draw.choice([draw.randint(1, 40), 513])
        x, dy = inputs((M, width))
        x = torch.cat([x, x], 1)[:, :width] if draw.random() < 0.5 else x
        for mine, theirs in zip(run(form("triton"), x, dy), in_float64(x, dy), strict=True):
            torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5, msg=f"{M} x {width}")


def test_opcheck() -> None:
    x, dy = inputs((3, 5, 12))
    torch.library.opcheck(gelu_backward_op, (dy, x))
    torch.library.opcheck(gelu_op, (x.requires_grad_(),))


def test_compiles_whole_and_recomputes() -> None:
    x, dy = inputs((3, 5, 24))

    def twice(x: Tensor) -> Tensor:
        return gelu(gelu(x, impl="triton"), impl="triton")

    eager = run(twice, x, dy)
    others = {
        "compiled": torch.compile(twice, fullgraph=True, backend="aot_eager"),
        "recomputed": lambda x: checkpoint(twice, x, use_reentrant=False),
        "recomputed by reentry": lambda x: checkpoint(twice, x, use_reentrant=True),
    }
    for name, function in others.items():
        given = x.clone().requires_grad_()
        y = function(given)
        y.backward(dy)
        for mine, theirs in zip((y, given.grad), eager, strict=True):
            assert torch.equal(mine, theirs), name


def test_wrong_arguments_are_named() -> None:
    x = torch.zeros(2, 4)
    with pytest.raises(KernelError, match=r"found x \(2, 0\), expected \[..., F\]"):
        gelu(torch.zeros(2, 0))
    with pytest.raises(KernelError, match="float64, expected float32"):
        gelu(x.double(), impl="triton")
