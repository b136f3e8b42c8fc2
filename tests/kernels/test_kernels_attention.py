"""Attention: the Triton kernels and the stock operator against the reference in float64, forward
and backward.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from chosen import slow_but
from kernels.attention import Strided, attention, attention_with_lse, backward, forward, reference
from kernels.attention.op import attention_op, check_shapes
from kernels.attention.options import Options
from kernels.attention.problem import Problem
from kernels.attention.tiles import KINDS, Tile, tile_for
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
    ours = reference.attention_with_lse(q, k, v, dropout=KEY, samples=SAMPLES[:2], head_offset=6)[0]
    torch.testing.assert_close(ours, out)


@pytest.mark.parametrize("tma", slow_but([True], [False, True]))
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("size", slow_but([(64, 16)], [(16, 64), (64, 16)]), ids=str)
def test_tiles_change_only_the_rounding(size: tuple[int, int], fused: bool, tma: bool) -> None:
    """Also with the inputs behind TMA descriptors, one of them a slice of a projection."""
    (q, k, v), do = inputs((1, 50, 77, 4, 2, 16))
    k, v = torch.stack([k, v], 2).unbind(2)
    assert Problem.of(Options(), False, q, k, v, do).described
    tile, samples = Tile(*size, 4, 1, tma), SAMPLES[:1]
    options = Options(softcap=3.0, window=40, key=KEY, head_offset=2, deterministic=not fused)
    o, lse = forward.forward(q, k, v, options, samples, tile=tile)
    gradients = backward.backward(do, None, q, k, v, o, lse, options, samples, tiles=(tile, tile))

    def true(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        key = {"dropout": KEY, "samples": samples, "head_offset": 2}
        return attention(q, k, v, window=40, softcap=3.0, **key, impl="reference")

    assert_close([o, *gradients], run(true, [q, k, v], do, torch.float64))


@pytest.mark.parametrize("size", [(16, 64), (64, 16)], ids=str)
def test_tiles_of_a_cached_pattern_begin_before_the_queries(size: tuple[int, int]) -> None:
    """With a pattern and a cache the first tile has rows before row 0; no descriptor or pointer may read them."""
    (q, k, v), do = inputs((1, 90, 203, 2, 1, 16))
    sparse = Strided(64, 1, 2)
    true = run(lambda *a: attention(*a, sparse=sparse, impl="reference"), [q, k, v], do, torch.float64)
    for tma in (False, True):
        tile, options = Tile(*size, 4, 1, tma), Options(sparse=sparse)
        o, lse = forward.forward(q, k, v, options, tile=tile)
        gradients = backward.backward(do, None, q, k, v, o, lse, options, tiles=(tile, tile))
        assert_close([o, *gradients], true)


def test_descriptors_stand_only_for_what_bulk_copies_can_read() -> None:
    x = torch.zeros(2, 8, 3, 64, dtype=torch.bfloat16)
    fused = torch.zeros(2, 8, 3, 3, 64, dtype=torch.bfloat16).unbind(2)[1]
    assert Problem.of(Options(), False, x, fused, x).described
    unaligned = torch.zeros(2 * 8 * 3 * 64 + 1, dtype=torch.bfloat16)[1:].view(x.shape)
    odd_rows = torch.zeros(2, 8, 3, 65, dtype=torch.bfloat16)[..., :64]
    expanded = x[:, :1].expand(x.shape)
    last_strided = torch.zeros(2, 8, 3, 128, dtype=torch.bfloat16)[..., ::2]
    for bad in (unaligned, odd_rows, expanded, last_strided, x[:0], x[..., :40], x[..., :8]):
        assert not Problem.of(Options(), False, bad, x, bad).described


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("major", [8, 9, 10, 12])
def test_every_head_has_a_tile(major: int, kind: str) -> None:
    for D in (1, 16, 40, 64, 128, 256):
        for itemsize in (2, 4):
            for crowded, small, described in itertools.product((False, True), repeat=3):
                tile = tile_for(kind, D, itemsize, major, crowded=crowded, small=small, described=described)
                assert not (tile.tma and (not described or itemsize == 4 or major not in (9, 10)))
                assert not small or max(tile.block_m, tile.block_n) <= 64


def test_only_the_sum_of_dq_has_no_order() -> None:
    tensors, do = inputs((2, 70, 70, 4, 2, 16))
    plain = run(using("triton"), tensors, do)
    fused = run(lambda *a: attention(*a, deterministic=False, impl="triton"), tensors, do)
    assert_equal(fused[:1] + fused[2:], plain[:1] + plain[2:])
    assert_close(fused, run(using("reference"), tensors, do, torch.float64))


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
    key = (KEY.p, KEY.seed, KEY.site, 2) if dropout else (0.0, 0, 0, 0)
    samples = SAMPLES[:1] if dropout else None
    torch.library.opcheck(attention_op, (*leaves, samples, None, 0, [], 0.0, *key, True))


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
        ((1, 4, 2, 264), (1, 4, 2, 264), "found heads of width 264, expected at most 256"),
    ],
)
def test_wrong_shapes_are_named(q: tuple[int, ...], k: tuple[int, ...], message: str) -> None:
    with pytest.raises(KernelError, match=message):
        attention(torch.zeros(q), torch.zeros(k), torch.zeros(k), impl="triton")


TORCH_ORDER = {
    "as many heads": ((2, 12, 1024, 64), (2, 12, 1024, 64)),
    "grouped heads": ((2, 8, 100, 64), (2, 2, 100, 64)),
    "decoding": ((2, 8, 1, 64), (2, 8, 100, 64)),
    "a cache": ((2, 8, 3, 64), (2, 8, 100, 64)),
}


@pytest.mark.parametrize("shapes", TORCH_ORDER.values(), ids=TORCH_ORDER)
def test_shapes_that_only_torch_s_order_can_have_are_refused(shapes: tuple) -> None:
    q, k = (torch.zeros(shape, device="meta") for shape in shapes)
    with pytest.raises(KernelError, match=r"fit as \[B, H, T, D\].*scaled_dot_product_attention: transpose\(1, 2\)"):
        attention(q, k, k)
    check_shapes(q.transpose(1, 2), k.transpose(1, 2), k.transpose(1, 2))


def refusal(q: Tensor, k: Tensor) -> str | None:
    try:
        check_shapes(q, k, k)
    except KernelError as error:
        return str(error)


@given(*[st.integers(1, 600)] * 2, *[st.integers(1, 40)] * 2)
def test_the_hint_comes_where_the_other_order_fits_alone(T: int, S: int, H: int, K: int) -> None:
    q, k = torch.zeros(1, T, H, 8, device="meta"), torch.zeros(1, S, K, 8, device="meta")
    swapped = q.transpose(1, 2), k.transpose(1, 2)
    for found, other in ((refusal(q, k), refusal(*swapped)), (refusal(*swapped), refusal(q, k))):
        assert found is None or ("[B, H, T, D]" in found) == (other is None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "found window = 0, expected at least 1"),
        ({"window": 3, "sparse": Strided(64, 1, 1)}, "expected one of the two"),
        ({"softcap": -1.0}, "found softcap = -1.0"),
        ({"softcap": math.inf}, "found softcap = inf"),
        ({"cu_seqlens": torch.tensor([0, 8])}, "of torch.int64, expected int32"),
        ({"cu_seqlens": torch.tensor([0], dtype=torch.int32)}, "found cu_seqlens .1,."),
        ({"cu_seqlens": torch.tensor([0, 5, 4, 8], dtype=torch.int32)}, "ascend from 0 to B . T = 8"),
        ({"cu_seqlens": torch.tensor([0, 4], dtype=torch.int32)}, "found cu_seqlens .0, 4., expected"),
        ({"cu_seqlens": torch.tensor([1, 8], dtype=torch.int32)}, "found cu_seqlens .1, 8., expected"),
    ],
)
def test_wrong_options_are_named(options: dict, message: str) -> None:
    q = torch.zeros(2, 4, 2, 8)
    with pytest.raises(KernelError, match=message):
        attention(q, q, q, **options)


def test_documents_need_all_queries() -> None:
    q = torch.zeros(1, 3, 2, 8)
    with pytest.raises(KernelError, match="found cu_seqlens with Tq = 3 and Tk = 4"):
        attention(q, *torch.zeros(2, 1, 4, 2, 8), cu_seqlens=torch.tensor([0, 4], dtype=torch.int32))


def test_what_the_stock_operator_has_not_is_refused() -> None:
    q = torch.zeros(1, 4, 2, 8)
    for options in ({"sparse": Strided(64, 1, 1)}, {"softcap": 1.0}):
        with pytest.raises(KernelError, match="stock operator has not"):
            attention(q, q, q, **options, impl="torch")
        attention(q, q, q, **options)  # the reference
    with pytest.raises(KernelError, match="stock operator has not"):
        attention_with_lse(q, q, q, impl="torch")


def test_wrong_samples_and_dtypes_are_named() -> None:
    q = torch.zeros(2, 4, 2, 8)
    for samples in (None, torch.zeros(3, dtype=torch.int64), torch.zeros(2)):
        with pytest.raises(KernelError, match="2 global sample numbers as int64"):
            attention(q, q, q, dropout=KEY, samples=samples)
    with pytest.raises(KernelError, match="expected one dtype"):
        attention(q, q.double(), q.double())
