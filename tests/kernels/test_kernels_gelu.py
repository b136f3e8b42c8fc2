"""GELU after a bias: the Triton kernels and the stock operator against the reference in float64."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.dispatch import KernelError
from kernels.gelu import PARTIALS, bias_gelu, bias_gelu_backward_op, bias_gelu_op, gelu_reference

# Of exp in the interpreter; infinity is right there.
pytestmark = pytest.mark.filterwarnings("ignore:overflow")
# One element, odd widths, several column tiles, more row tiles than partial sums, none at all.
SHAPES = [(1,), (1, 3), (7, 14), (2, 3, 1031), (2, 1, 4100), (2, 0, 4), (0, 8), (PARTIALS * 32 + 40, 33)]


def run(function, x: Tensor, bias: Tensor | None, dy: Tensor) -> list[Tensor]:
    """The output and the gradient of each tensor."""
    given = [t.detach().requires_grad_() for t in (x, bias) if t is not None]
    y = function(*given) if bias is not None else function(given[0], None)
    return [y, *torch.autograd.grad(y, given, dy.to(y.dtype))]


def form(impl: str) -> Any:
    return lambda x, bias: bias_gelu(x, bias, impl=impl)


def inputs(shape: tuple[int, ...], bias: bool, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    x, dy = torch.randn(shape) * 2, torch.randn(shape)
    return x.to(dtype), torch.randn(shape[-1]).to(dtype) if bias else None, dy.to(dtype)


def in_float64(x: Tensor, bias: Tensor | None, dy: Tensor) -> list[Tensor]:
    return run(gelu_reference, x.double(), None if bias is None else bias.double(), dy)


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape: tuple[int, ...], bias: bool, impl: str) -> None:
    tensors = inputs(shape, bias)
    atol = 1e-5 if shape[0] < 1000 else 5e-5  # of a sum of so many
    for mine, theirs in zip(run(form(impl), *tensors), in_float64(*tensors), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=atol)


def test_the_reference_is_the_stock_operator_and_has_its_gradient() -> None:
    x, bias, dy = inputs((5, 9), bias=True, dtype=torch.float64)
    for mine, theirs in zip(run(gelu_reference, x, bias, dy), run(form("torch"), x, bias, dy), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert torch.autograd.gradcheck(gelu_reference, (x.requires_grad_(), bias.requires_grad_()))


def test_the_stock_form_is_the_models_own_to_the_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, _, dy = inputs((2, 5, 12), bias=False, dtype=dtype)
        theirs = run(lambda x, _: F.gelu(x, approximate="tanh"), x, None, dy)
        for mine, other in zip(run(bias_gelu, x, None, dy), theirs, strict=True):
            assert torch.equal(mine, other)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_round_only_the_results(dtype: torch.dtype, bias: bool) -> None:
    tensors = inputs((40, 70), bias, dtype)
    for mine, theirs in zip(run(form("triton"), *tensors), in_float64(*tensors), strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), theirs, rtol=1.02 * torch.finfo(dtype).eps / 2, atol=1e-5)


def test_16_bit_rows_with_an_fp32_bias() -> None:
    x, _, dy = inputs((9, 16), False, torch.bfloat16)
    bias = torch.randn(16)
    ours = run(form("triton"), x, bias, dy)
    assert [t.dtype for t in ours] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for mine, theirs, rtol in zip(ours, in_float64(x, bias, dy), (4e-3, 4e-3, 1e-5), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=rtol, atol=1e-5)
    assert form("torch")(x, bias).dtype == torch.bfloat16


def test_a_frozen_bias_gets_no_gradient() -> None:
    x, bias, dy = inputs((70, 12), bias=True)
    given = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(bias_gelu(given, bias, impl="triton"), given, dy)
    assert torch.equal(dx, run(form("triton"), x, bias, dy)[1])


def test_large_inputs_do_not_overflow() -> None:
    tensors = torch.tensor([[-1e4, -20.0, 20.0, 1e4]]), None, torch.ones(1, 4)
    for mine, theirs in zip(run(form("triton"), *tensors), in_float64(*tensors), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-6, atol=1e-30)


def test_the_slope_keeps_its_last_bits_where_the_sigmoid_is_near_one() -> None:
    x = torch.linspace(-8, 8, 2001)[None]
    dx = run(form("triton"), x, None, torch.ones_like(x))[1]
    exact = in_float64(x, None, torch.ones_like(x))[1]
    assert (dx - exact).abs().max() < 7e-7


def layouts(x: Tensor) -> dict[str, Tensor]:
    """Tensors equal to x with other strides."""
    return {
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "last dimension strided": torch.stack([x, x], -1).flatten(-2)[..., ::2],
        "rows of a wider tensor": torch.cat([x, x], -1)[..., : x.shape[-1]],
    }


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("which", ["transposed", "last dimension strided", "rows of a wider tensor"])
def test_strides_change_nothing(which: str, bias: bool) -> None:
    x, b, dy = inputs((3, 5, 12), bias)
    plain = run(form("triton"), x, b, dy)
    strided_bias = None if b is None else torch.stack([b, b], -1)[:, 0]
    for given, gradient in ((layouts(x)[which], dy), (x, layouts(dy)[which]), (layouts(x)[which], layouts(dy)[which])):
        ours = run(form("triton"), given, strided_bias, gradient)
        for mine, theirs in zip(ours, plain, strict=True):
            assert torch.equal(mine, theirs)


def test_expanded_gradients() -> None:
    x, bias, _ = inputs((3, 5, 12), bias=True)
    for scale in (torch.tensor(0.5), torch.randn(12)):
        ours = run(form("triton"), x, bias, scale.expand(3, 5, 12))
        dense = run(form("triton"), x, bias, scale.expand(3, 5, 12).contiguous())
        for mine, theirs in zip(ours, dense, strict=True):
            assert torch.equal(mine, theirs)


def test_random_shapes() -> None:
    draw = random.Random(0)
    for _ in range(12):
        M, width, bias = draw.randint(1, 90), draw.choice([draw.randint(1, 40), 513]), draw.random() < 0.6
        x, b, dy = inputs((M, width), bias)
        x = torch.cat([x, x], 1)[:, :width] if draw.random() < 0.5 else x
        for mine, theirs in zip(run(form("triton"), x, b, dy), in_float64(x, b, dy), strict=True):
            torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5, msg=f"{M} x {width} {bias}")


def test_opcheck() -> None:
    x, bias, dy = inputs((3, 5, 12), bias=True)
    torch.library.opcheck(bias_gelu_backward_op, (dy, x, bias, True))
    torch.library.opcheck(bias_gelu_backward_op, (dy, x, None, False))
    torch.library.opcheck(bias_gelu_op, (x.requires_grad_(), bias.requires_grad_()))
    torch.library.opcheck(bias_gelu_op, (x, None))


def test_compiles_whole_and_recomputes() -> None:
    x, bias, dy = inputs((3, 5, 24), bias=True)

    def twice(x: Tensor, bias: Tensor) -> Tensor:
        return bias_gelu(bias_gelu(x, bias, impl="triton"), None, impl="triton")

    eager = run(twice, x, bias, dy)
    others = {
        "compiled": torch.compile(twice, fullgraph=True, backend="aot_eager"),
        "recomputed": lambda *a: checkpoint(twice, *a, use_reentrant=False),
        "recomputed by reentry": lambda *a: checkpoint(twice, *a, use_reentrant=True),
    }
    for name, function in others.items():
        given = [t.clone().requires_grad_() for t in (x, bias)]
        y = function(*given)
        y.backward(dy)
        for mine, theirs in zip((y, *(t.grad for t in given)), eager, strict=True):
            assert torch.equal(mine, theirs), name


def test_wrong_arguments_are_named() -> None:
    x = torch.zeros(2, 4)
    with pytest.raises(KernelError, match=r"found bias \(3,\), expected \(4,\)"):
        bias_gelu(x, torch.zeros(3))
    with pytest.raises(KernelError, match=r"found x \(2, 0\), expected \[..., F\]"):
        bias_gelu(torch.zeros(2, 0), None)
    with pytest.raises(KernelError, match="float64, expected float32"):
        bias_gelu(x.double(), None, impl="triton")
