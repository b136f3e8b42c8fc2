"""SwiGLU: the Triton kernels and the stock operators against the reference in float64."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.dispatch import KernelError
from kernels.swiglu import swiglu, swiglu_backward_op, swiglu_op, swiglu_reference

# One pair, odd widths, more than a tile of one row, several column tiles with a ragged last one, several row tiles.
SHAPES = [(2,), (1, 6), (7, 14), (2, 3, 2062), (2, 1, 4100), (70, 34), (2, 0, 4), (0, 8)]


def run(function, x: Tensor, dy: Tensor) -> list[Tensor]:
    """The output and the gradient of x."""
    x = x.detach().requires_grad_()
    y = function(x)
    return [y, *torch.autograd.grad(y, x, dy.to(y.dtype))]


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(shape) * 3
    return x.to(dtype), torch.randn(*shape[:-1], shape[-1] // 2).to(dtype)


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape: tuple[int, ...], impl: str) -> None:
    x, dy = inputs(shape)
    ours = run(lambda x: swiglu(x, impl=impl), x, dy)
    oracle = run(swiglu_reference, x.double(), dy)
    for mine, theirs in zip(ours, oracle, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=2e-6, atol=2e-6)


def test_the_stock_form_is_the_models_own_to_the_bit() -> None:
    def activate(x: Tensor) -> Tensor:
        gate, up = x.unflatten(-1, (-1, 2)).unbind(-1)
        return F.silu(gate.contiguous()) * up

    for dtype in (torch.float32, torch.bfloat16):
        x, dy = inputs((2, 5, 12), dtype)
        for mine, theirs in zip(run(swiglu, x, dy), run(activate, x, dy), strict=True):
            assert torch.equal(mine, theirs)


def test_the_references_gradient() -> None:
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu_reference, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_round_only_the_results(dtype: torch.dtype) -> None:
    x, dy = inputs((9, 80), dtype)
    ours = run(lambda x: swiglu(x, impl="triton"), x, dy)
    oracle = run(swiglu_reference, x.double(), dy)
    for mine, theirs in zip(ours, oracle, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), theirs, rtol=1.02 * torch.finfo(dtype).eps / 2, atol=1e-6)


@pytest.mark.filterwarnings("ignore:overflow")  # exp(200) in the interpreter; infinity is right there
def test_large_gates_do_not_overflow() -> None:
    x, dy = torch.tensor([[-200.0, 1.0, 200.0, 1.0, -88.5, 2.0]]), torch.ones(1, 3)
    ours = run(lambda x: swiglu(x, impl="triton"), x, dy)
    for mine, theirs in zip(ours, run(swiglu_reference, x.double(), dy), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-6, atol=1e-30)


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
    plain = run(lambda x: swiglu(x, impl="triton"), x, dy)
    for given, gradient in ((layouts(x)[which], dy), (x, layouts(dy)[which]), (layouts(x)[which], layouts(dy)[which])):
        ours = run(lambda x: swiglu(x, impl="triton"), given, gradient)
        for mine, theirs in zip(ours, plain, strict=True):
            assert torch.equal(mine, theirs)


def test_expanded_gradients() -> None:
    x, _ = inputs((3, 5, 12))
    for scale in (torch.tensor(0.5), torch.randn(6)):
        ours = run(lambda x: swiglu(x, impl="triton"), x, scale.expand(3, 5, 6))
        dense = run(lambda x: swiglu(x, impl="triton"), x, scale.expand(3, 5, 6).contiguous())
        for mine, theirs in zip(ours, dense, strict=True):
            assert torch.equal(mine, theirs)


def test_random_shapes() -> None:
    draw = random.Random(0)
    for _ in range(12):
        M, width = draw.randint(1, 40), draw.choice([draw.randint(1, 40), 513])
        x, dy = inputs((M, 2 * width))
        x = torch.cat([x, x], 1)[:, : 2 * width] if draw.random() < 0.5 else x
        ours = run(lambda x: swiglu(x, impl="triton"), x, dy)
        oracle = run(swiglu_reference, x.double(), dy)
        for mine, theirs in zip(ours, oracle, strict=True):
            torch.testing.assert_close(mine.double(), theirs, rtol=2e-6, atol=2e-6, msg=f"{M} x {width}")


def test_opcheck() -> None:
    x, dy = inputs((3, 5, 12))
    torch.library.opcheck(swiglu_op, (x.requires_grad_(),))
    torch.library.opcheck(swiglu_backward_op, (dy, x.detach()))


def test_compiles_whole_and_recomputes() -> None:
    x, dy = inputs((3, 5, 24))
    dy = dy[..., :6]

    def twice(x: Tensor) -> Tensor:
        return swiglu(swiglu(x, impl="triton"), impl="triton")

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
    with pytest.raises(KernelError, match=r"found x \(2, 5\), expected \[..., 2 F\]"):
        swiglu(torch.zeros(2, 5))
    with pytest.raises(KernelError, match=r"found x \(2, 0\)"):
        swiglu(torch.zeros(2, 0))
    with pytest.raises(KernelError, match=r"found x \(\)"):
        swiglu(torch.zeros(()))
    with pytest.raises(KernelError, match="float64, expected float32"):
        swiglu(torch.zeros(2, 4).double(), impl="triton")
