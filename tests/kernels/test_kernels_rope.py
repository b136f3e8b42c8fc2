"""Rotary position encoding: the Triton kernel and the stock operators against the reference in float64."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.dispatch import KernelError
from kernels.rope import HEADS, rope_qkv, rope_qkv_backward_op, rope_qkv_op, rope_qkv_reference, rope_reference

# B, T, K, R, D: one token, an odd half width, more heads than a program takes, tiles of tokens across samples, grouped
# queries, one key/value head, none at all.
SHAPES = [
    (1, 1, 1, 1, 2), (2, 5, 3, 1, 10), (1, 3, HEADS, 1, 4), (3, 50, 1, 1, 64), (2, 7, 2, 4, 16), (1, 9, 1, 7, 24),
    (0, 3, 1, 1, 4), (2, 0, 1, 1, 4),
]  # fmt: skip


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, first: int = 0
) -> tuple[Tensor, Tensor, list[Tensor], dict[str, int]]:
    """qkv, positions, the gradients of q, k, v, and the sizes as arguments."""
    B, T, K, R, D = shape
    torch.manual_seed(0)
    qkv = torch.randn(B, T, K * (R + 2) * D).to(dtype)
    gradients = [torch.randn(B, T, heads, D).to(dtype) for heads in (K * R, K, K)]
    return qkv, torch.arange(T) + first, gradients, {"n_kv_head": K, "head_dim": D}


def run(function: Callable[..., Any], qkv: Tensor, gradients: list[Tensor]) -> list[Tensor]:
    """q, k, v and the gradient of qkv."""
    qkv = qkv.detach().requires_grad_()
    out = function(qkv)
    return [*out, *torch.autograd.grad(out, qkv, [g.to(o.dtype) for g, o in zip(gradients, out, strict=True)])]


def form(impl: str, positions: Tensor, sizes: dict[str, int], **options: Any) -> Callable[[Tensor], Any]:
    return lambda qkv: rope_qkv(qkv, positions, **sizes, impl=impl, **options)


def in_float64(qkv: Tensor, positions: Tensor, gradients: list[Tensor], sizes: dict[str, int], **options: Any) -> Any:
    return run(lambda qkv: rope_qkv_reference(qkv, positions, **sizes, **options), qkv.double(), gradients)


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape: tuple[int, ...], impl: str) -> None:
    qkv, positions, gradients, sizes = inputs(shape)
    ours = run(form(impl, positions, sizes), qkv, gradients)
    for mine, theirs in zip(ours, in_float64(qkv, positions, gradients, sizes), strict=True):
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("first", [1_000_000, 123_456_789])
def test_far_positions_turn_by_the_angle_of_fp32(first: int) -> None:
    qkv, positions, gradients, sizes = inputs((1, 64, 1, 1, 64), first=first)
    ours = run(form("triton", positions, sizes, theta=5e5), qkv, gradients)
    for mine, theirs in zip(ours, in_float64(qkv, positions, gradients, sizes, theta=5e5), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-6, atol=1e-6)


def test_turning_is_what_the_paper_says() -> None:
    """Scores depend on distances alone, and pair i at position p turns by p theta^(-2i/D)."""
    q, k = torch.randn(1, 1, 1, 8).double(), torch.randn(1, 1, 1, 8).double()

    def at(x: Tensor, p: int) -> Tensor:
        return rope_reference(x, torch.tensor([p]), theta=100.0)

    torch.testing.assert_close((at(q, 9) * at(k, 4)).sum(), (at(q, 25) * at(k, 20)).sum(), rtol=1e-5, atol=1e-5)
    one = torch.zeros(8).double()
    one[1] = 1
    angle = torch.tensor(3 * 100 ** (-2 * 1 / 8)).double()
    turned = at(one.view(1, 1, 1, 8), 3).flatten()
    torch.testing.assert_close(turned[[1, 5]], torch.stack([angle.cos(), angle.sin()]), rtol=1e-6, atol=1e-6)


def test_the_references_gradient() -> None:
    qkv, positions, _, sizes = inputs((2, 3, 1, 2, 4), torch.float64)
    assert torch.autograd.gradcheck(lambda qkv: rope_qkv_reference(qkv, positions, **sizes), qkv.requires_grad_())


def models_own(qkv: Tensor, positions: Tensor, K: int, R: int, theta: float) -> tuple[Tensor, Tensor, Tensor]:
    """What the model computed before it had these kernels."""

    def rotate(x: Tensor) -> Tensor:
        D = x.shape[-1]
        frequencies = theta ** (-torch.arange(0, D, 2, device=x.device, dtype=torch.float32) / D)
        angles = torch.outer(positions.float(), frequencies)[:, None, None, :]
        cos, sin = angles.cos(), angles.sin()
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)

    B, T, W = qkv.shape
    D = W // (K * (R + 2))
    qkv = qkv.view(B, T, -1, R + 2, D)
    qk, v = qkv[:, :, :, : R + 1], qkv[:, :, :, R + 1]
    qk = rotate(qk)
    return qk[:, :, :, :R].reshape(B, T, -1, D), qk[:, :, :, R], v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_stock_form_is_the_models_own_to_the_bit(dtype: torch.dtype) -> None:
    for R, first in ((1, 0), (3, 999_000)):
        qkv, positions, gradients, sizes = inputs((2, 5, 2, R, 16), dtype, first)
        theirs = run(lambda qkv, p=positions, R=R: models_own(qkv, p, 2, R, 1e4), qkv, gradients)
        for mine, other in zip(run(form("auto", positions, sizes), qkv, gradients), theirs, strict=True):
            assert torch.equal(mine, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_round_only_the_results(dtype: torch.dtype) -> None:
    qkv, positions, gradients, sizes = inputs((2, 9, 2, 2, 20), dtype)
    ours = run(form("triton", positions, sizes), qkv, gradients)
    for mine, theirs in zip(ours, in_float64(qkv, positions, gradients, sizes), strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), theirs, rtol=1.02 * torch.finfo(dtype).eps / 2, atol=1e-6)


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
def test_each_token_may_have_a_position_of_its_own(impl: str) -> None:
    qkv, _, gradients, sizes = inputs((2, 6, 1, 2, 8))
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [4, 5, 6, 7, 0, 1]])
    ours = run(form(impl, positions, sizes), qkv, gradients)
    for b in range(2):
        alone = run(form(impl, positions[b].clone(), sizes), qkv[b : b + 1], [g[b : b + 1] for g in gradients])
        for mine, theirs in zip(ours, alone, strict=True):
            assert torch.equal(mine[b : b + 1], theirs)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """Tensors equal to x with other strides."""
    return {
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "heads first": x.transpose(1, 2).contiguous().transpose(1, 2),
        "last dimension strided": torch.stack([x, x], -1).flatten(-2)[..., ::2],
        "rows of a wider tensor": torch.cat([x, x], -1)[..., : x.shape[-1]],
    }


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("which", ["transposed", "heads first", "last dimension strided", "rows of a wider tensor"])
def test_strides_change_nothing(which: str, impl: str) -> None:
    qkv, positions, gradients, sizes = inputs((2, 5, 2, 2, 12))
    function = form(impl, torch.stack([positions, positions], -1)[:, 0], sizes)
    plain = run(function, qkv, gradients)
    for n in range(3):
        mixed = [layouts(g)[which] if i <= n else g for i, g in enumerate(gradients)]
        for mine, theirs in zip(run(function, layouts(qkv)[which], mixed), plain, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_expanded_and_missing_gradients(impl: str) -> None:
    qkv, positions, gradients, sizes = inputs((2, 5, 2, 2, 12))
    qkv.requires_grad_()
    out = form(impl, positions, sizes)(qkv)
    for scale in (torch.tensor(0.5), torch.randn(12)):
        expanded = [scale.expand(o.shape) for o in out]
        mine = torch.autograd.grad(out, qkv, expanded, retain_graph=True)[0]
        theirs = torch.autograd.grad(out, qkv, [e.contiguous() for e in expanded], retain_graph=True)[0]
        assert torch.equal(mine, theirs)
    for n in range(3):
        (mine,) = torch.autograd.grad(out[n], qkv, gradients[n], retain_graph=True)
        zeros = [g if i == n else torch.zeros_like(g) for i, g in enumerate(gradients)]
        (theirs,) = torch.autograd.grad(out, qkv, zeros, retain_graph=True)
        assert torch.equal(mine, theirs)


def test_random_shapes() -> None:
    draw = random.Random(0)
    for _ in range(12):
        shape = (*(draw.randint(1, n) for n in (3, 40, 5, 4)), 2 * draw.randint(1, 20))
        qkv, positions, gradients, sizes = inputs(shape, first=draw.randint(0, 100_000))
        ours = run(form("triton", positions, sizes), qkv, gradients)
        for mine, theirs in zip(ours, in_float64(qkv, positions, gradients, sizes), strict=True):
            torch.testing.assert_close(mine.double(), theirs, rtol=1e-6, atol=1e-6, msg=f"{shape}")


def test_opcheck() -> None:
    qkv, positions, gradients, _ = inputs((2, 5, 2, 2, 12))
    torch.library.opcheck(rope_qkv_backward_op, (*gradients, positions, 1e4))
    torch.library.opcheck(rope_qkv_op, (qkv.requires_grad_(), positions, 1e4, 2, 12))


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_compiles_whole_and_recomputes(impl: str) -> None:
    qkv, positions, gradients, sizes = inputs((2, 5, 2, 2, 12))

    def function(qkv: Tensor) -> tuple[Tensor, ...]:
        return rope_qkv(qkv, positions, **sizes, impl=impl)

    eager = run(function, qkv, gradients)
    others = {
        "compiled": torch.compile(function, fullgraph=True, backend="aot_eager"),
        "recomputed": lambda qkv: checkpoint(function, qkv, use_reentrant=False),
        "recomputed by reentry": lambda qkv: checkpoint(function, qkv, use_reentrant=True),
    }
    for name, other in others.items():
        given = qkv.clone().requires_grad_()
        out = other(given)
        torch.autograd.backward(out, gradients)
        for mine, theirs in zip((*out, given.grad), eager, strict=True):
            assert torch.equal(mine, theirs), name


def test_wrong_arguments_are_named() -> None:
    qkv, positions, _, sizes = inputs((2, 5, 2, 2, 12))
    with pytest.raises(KernelError, match=r"found qkv \(2, 5, 96\), expected .* with K = 5, D = 12"):
        rope_qkv(qkv, positions, n_kv_head=5, head_dim=12)
    with pytest.raises(KernelError, match="R at least 1"):
        rope_qkv(qkv, positions, n_kv_head=4, head_dim=12)
    with pytest.raises(KernelError, match="heads of width 3, expected an even width"):
        rope_qkv(qkv, positions, n_kv_head=2, head_dim=3)
    with pytest.raises(KernelError, match=r"found positions torch.int64 \(4,\) .* expected int64 \(5,\), or \(2, 5\)"):
        rope_qkv(qkv, positions[:4], **sizes)
    with pytest.raises(KernelError, match=r"found positions torch.int32"):
        rope_qkv(qkv, positions.int(), **sizes)
    with pytest.raises(KernelError, match="float64, expected float32"):
        rope_qkv(qkv.double(), positions, **sizes, impl="triton")
