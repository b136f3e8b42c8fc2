"""Attention: the Triton kernels and the stock operator against the reference in float64, forward
and backward.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels import reference
from kernels.attention import attention, backward, forward
from kernels.attention.op import attention_op
from kernels.attention.tiles import Tile
from kernels.dispatch import KernelError
from kernels.philox import DropoutKey, keep_mask

KEY = DropoutKey(0.3, 2**32 - 5, 7)
SAMPLES = torch.tensor([2**33 + 5, 0, 7])
# (B, Tq, Tk, H, K, D)
SHAPES = [
    (1, 1, 1, 1, 1, 16),
    (2, 7, 7, 2, 2, 40),
    (1, 33, 33, 4, 2, 64),
    (1, 130, 130, 2, 1, 16),
    (1, 1, 33, 2, 1, 40),
    (1, 33, 130, 4, 2, 16),
]
Shape = tuple[int, int, int, int, int, int]


def inputs(shape: Shape, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    """(q, k, v) and a gradient of the output."""
    B, Tq, Tk, H, K, D = shape
    torch.manual_seed(0)
    sizes = [(B, Tq, H, D), (B, Tk, K, D), (B, Tk, K, D), (B, Tq, H, D)]
    q, k, v, do = (torch.randn(size).to(dtype) for size in sizes)
    return [q, k, v], do


def run(function, tensors: list[Tensor], do: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The output and the gradients of q, k, v."""
    copies = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    o = function(*copies)
    return [o, *torch.autograd.grad(o, copies, do.to(o.dtype))]


def using(impl: str, key: DropoutKey | None = None, samples: Tensor | None = None, head_offset: int = 0):
    return lambda q, k, v: attention(q, k, v, dropout=key, samples=samples, head_offset=head_offset, impl=impl)


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for mine, their in zip(ours, theirs, strict=True):
        assert torch.equal(mine, their)


def assert_close(ours: list[Tensor], oracle: list[Tensor], tolerance: float = 1e-5) -> None:
    for mine, theirs in zip(ours, oracle, strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_against_float64(shape: Shape, dropout: bool) -> None:
    tensors, do = inputs(shape)
    key, samples = (KEY, SAMPLES[: shape[0]]) if dropout else (None, None)
    ours = run(using("triton", key, samples, 3), tensors, do)
    assert_close(ours, run(using("reference", key, samples, 3), tensors, do, torch.float64))


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pytorch_forms_against_float64(shape: Shape, impl: str) -> None:
    tensors, do = inputs(shape)
    assert_close(run(using(impl), tensors, do), run(using("reference"), tensors, do, torch.float64))


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("D", [8, 16, 40, 64, 100, 256])
@pytest.mark.parametrize("lengths", [(1, 1), (7, 7), (33, 33), (130, 130), (7, 130), (64, 65)], ids=str)
def test_triton_against_float64_everywhere(
    lengths: tuple[int, int], D: int, heads: tuple[int, int], dropout: bool
) -> None:
    test_triton_against_float64((2, *lengths, *heads, D), dropout)


def test_the_reference_by_hand() -> None:
    """Loops over every query, in float64, with the mask drawn element by element."""
    shape = (2, 3, 5, 4, 2, 8)
    (q, k, v), _ = inputs(shape, torch.float64)
    out = torch.zeros_like(q)
    for b in range(2):
        for i in range(3):
            for h in range(4):
                seen, kv = i + 3, h // 2
                weights = (k[b, :seen, kv] @ q[b, i, h] / 8**0.5).softmax(0)
                at = (SAMPLES[b : b + 1], torch.tensor([i + 2]), seen, torch.tensor([h + 6]))
                keep = keep_mask(KEY, *at)[0, 0, 0]
                out[b, i, h] = (weights * keep / (1 - KEY.p)) @ v[b, :seen, kv]
    ours = reference.attention(q, k, v, dropout=KEY, samples=SAMPLES[:2], head_offset=6)
    torch.testing.assert_close(ours, out)


@pytest.mark.parametrize("tile", [Tile(16, 64, 4, 1), Tile(64, 16, 4, 1)], ids=str)
def test_tiles_change_only_the_rounding(tile: Tile) -> None:
    (q, k, v), do = inputs((1, 50, 77, 2, 1, 16))
    samples = SAMPLES[:1]
    o, lse = forward.forward(q, k, v, KEY, samples, 2, tile)
    gradients = backward.backward(do, q, k, v, o, lse, KEY, samples, 2, (tile, tile))
    assert_close([o, *gradients], run(using("reference", KEY, samples, 2), [q, k, v], do, torch.float64))


def test_a_shard_of_the_heads_draws_the_masks_of_the_whole() -> None:
    (q, k, v), do = inputs((2, 20, 20, 4, 2, 16))
    for impl in ("triton", "reference"):
        whole = run(using(impl, KEY, SAMPLES[:2]), [q, k, v], do)
        shard = run(using(impl, KEY, SAMPLES[:2], 2), [q[:, :, 2:], k[:, :, 1:], v[:, :, 1:]], do[:, :, 2:])
        assert_close(shard, [whole[0][:, :, 2:], whole[1][:, :, 2:], whole[2][:, :, 1:], whole[3][:, :, 1:]])


def test_samples_may_be_split_over_ranks() -> None:
    (q, k, v), do = inputs((3, 20, 20, 2, 2, 16))
    whole = run(using("triton", KEY, SAMPLES), [q, k, v], do)
    part = run(using("triton", KEY, SAMPLES[1:]), [q[1:], k[1:], v[1:]], do[1:])
    assert_equal(part, [t[1:] for t in whole])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit(dtype: torch.dtype) -> None:
    """Within twice the error of the stock operator in the same dtype (the rule of FlashAttention's
    tests).
    """
    tensors, do = inputs((1, 70, 70, 2, 1, 40), dtype)
    oracle = run(using("reference"), tensors, do, torch.float64)
    stock = run(using("torch"), tensors, do)
    ours = run(using("triton"), tensors, do)
    for mine, theirs, true in zip(ours, stock, oracle, strict=True):
        assert mine.dtype == dtype
        rounding = torch.finfo(dtype).eps * true.abs().max()
        assert (mine - true).abs().max() <= 2 * (theirs - true).abs().max() + rounding


def test_strides_change_nothing() -> None:
    tensors, do = inputs((2, 20, 20, 2, 2, 16))
    plain = run(using("triton", KEY, SAMPLES[:2]), tensors, do)
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (*tensors, do)]
    fused = torch.stack([*tensors, do], dim=2).unbind(2)  # slices of one projection
    last_strided = [torch.stack([t, t], -1).flatten(-2)[..., ::2] for t in (*tensors, do)]
    for q, k, v, gradient in (heads_first, fused, last_strided):
        leaves = [t.requires_grad_() for t in (q.detach(), k.detach(), v.detach())]
        assert not leaves[0].is_contiguous()
        o = using("triton", KEY, SAMPLES[:2])(*leaves)
        assert_equal([o, *torch.autograd.grad(o, leaves, gradient)], plain)


def test_expanded_gradients() -> None:
    tensors, _ = inputs((2, 20, 20, 2, 1, 16))
    for do in (
        torch.tensor(0.5).expand(2, 20, 2, 16),
        torch.randn(2, 1, 2, 16).expand(2, 20, 2, 16),
    ):
        ours = run(using("triton"), tensors, do)
        assert_close(ours, run(using("reference"), tensors, do, torch.float64))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # of masked scores
def test_large_scores_stay_finite() -> None:
    tensors, do = inputs((1, 40, 40, 1, 1, 16))
    tensors = [tensors[0] * 300, *tensors[1:]]
    assert_close(run(using("triton"), tensors, do), run(using("reference"), tensors, do, torch.float64), 1e-3)


def test_gradients_are_those_of_finite_differences() -> None:
    (q, k, v), _ = inputs((1, 3, 4, 2, 1, 4), torch.float64)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    assert torch.autograd.gradcheck(using("reference", KEY, SAMPLES[:1]), leaves)


@pytest.mark.parametrize("dropout", [False, True])
def test_opcheck(dropout: bool) -> None:
    (q, k, v), _ = inputs((1, 5, 6, 2, 1, 16))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    key = (SAMPLES[:1], KEY.p, KEY.seed, KEY.site, 2) if dropout else (None, 0.0, 0, 0, 0)
    torch.library.opcheck(attention_op, (*leaves, *key))


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_compiles_whole_and_recomputes(impl: str) -> None:
    tensors, do = inputs((2, 9, 9, 2, 1, 16))
    function = using(impl, KEY, SAMPLES[:2], 1)
    eager = run(function, tensors, do)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_equal(run(compiled, tensors, do), eager)
    assert_equal(run(lambda *a: checkpoint(function, *a, use_reentrant=False), tensors, do), eager)
    copies = [t.detach().requires_grad_() for t in tensors]
    checkpoint(function, *copies, use_reentrant=True).backward(do)
    assert_equal([c.grad for c in copies if c.grad is not None], eager[1:])


@pytest.mark.parametrize(
    ("q", "k", "message"),
    [
        ((1, 4, 3, 8), (1, 4, 2, 8), "multiple of K"),
        ((1, 4, 2, 8), (1, 3, 2, 8), "1 <= Tq <= Tk"),
        ((1, 4, 2, 8), (1, 4, 2, 16), "expected .B, Tq, H, D."),
        ((4, 2, 8), (4, 2, 8), "expected .B, Tq, H, D."),
        ((1, 4, 2, 264), (1, 4, 2, 264), "found width 264, expected at most 256"),
    ],
)
def test_wrong_shapes_are_named(q: tuple[int, ...], k: tuple[int, ...], message: str) -> None:
    with pytest.raises(KernelError, match=message):
        attention(torch.zeros(q), torch.zeros(k), torch.zeros(k), impl="triton")


def test_wrong_samples_and_dtypes_are_named() -> None:
    q = torch.zeros(2, 4, 2, 8)
    for samples in (None, torch.zeros(3, dtype=torch.int64), torch.zeros(2)):
        with pytest.raises(KernelError, match="2 global sample numbers as int64"):
            attention(q, q, q, dropout=KEY, samples=samples)
    with pytest.raises(KernelError, match="expected one dtype"):
        attention(q, q.double(), q.double())
