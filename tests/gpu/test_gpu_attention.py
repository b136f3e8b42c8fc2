"""Compiled attention on a GPU (`make test-gpu`): every mask, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.attention import Strided, attention, attention_with_lse
from kernels.attention.reference import attention_with_lse as oracle_with_lse
from kernels.attention.reference import visible
from kernels.philox import DropoutKey
from rounding import DTYPES, GPU_ONLY, assert_repeats, assert_within_rounding, run

pytestmark = GPU_ONLY
KEY = DropoutKey(0.2, 2**32 - 5, 7)
# (D, (H, K))
HEADS = [
    (16, (2, 2)), (32, (6, 2)), (40, (3, 1)), (64, (2, 2)), (64, (6, 2)), (80, (2, 1)), (96, (2, 2)), (128, (3, 1)),
    (128, (6, 2)), (192, (2, 1)), (256, (4, 2)),
]  # fmt: skip
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# (D, dtype) of the masks, each of which compiles its own kernels
MASKED = [(64, BF16), (96, BF16), (128, BF16), (256, BF16), (40, FP16), (64, FP32)]
# (Tq, Tk): FlashAttention's own list, where Tq <= Tk
LENGTHS = [
    (1, 1), (1, 300), (64, 128), (128, 192), (256, 256), (239, 239), (113, 203), (113, 128), (128, 217), (113, 211),
    (108, 256), (256, 512), (1024, 1024), (1023, 1024),
]  # fmt: skip
LONG = [(4096, 4096), (4224, 4224)]
# Options of `attention`; documents as the places where they begin, among 2 * 700 tokens.
MASKS: dict[str, dict[str, Any]] = {
    "window 2": {"window": 2},
    "window": {"window": 200},
    "documents": {"documents": (1, 1, 2, 130, 600, 800, 1399)},
    "window, documents": {"window": 100, "documents": (150, 650, 1100)},
    "strided": {"sparse": Strided(64, 2, 3)},
    "wide strided": {"sparse": Strided(192, 1, 2)},
    "softcap": {"softcap": 15.0},
    "window, documents, softcap": {"window": 300, "documents": (30, 900), "softcap": 5.0},
    "strided, softcap": {"sparse": Strided(128, 1, 3), "softcap": 5.0},
}


def on_gpu(mask: dict[str, Any], dropout: bool = False) -> dict[str, Any]:
    options = {name: value for name, value in mask.items() if name != "documents"}
    if "documents" in mask:
        bounds = [0, *mask["documents"], 1400]
        options["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32, device="cuda")
    if dropout:
        samples = torch.tensor([2**33 + 5, 0], device="cuda")
        options |= {"dropout": KEY, "samples": samples, "head_offset": 3}
    return options


def plain_attention(q: Tensor, k: Tensor, v: Tensor, softcap: float = 0.0, **mask: Any) -> Tensor:
    """Attention with every step in the dtype of q: what rounding alone costs."""
    B, Tq, Tk, repeats = *q.shape[:2], k.shape[1], q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(repeats, 2) for t in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    seen = visible(B, Tq, Tk, mask.get("window"), mask.get("sparse"), mask.get("cu_seqlens"), q.device)
    weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v)


def attention_inputs(
    lengths: tuple[int, int], heads: tuple[int, int], D: int, dtype: torch.dtype, B: int = 2
) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    (Tq, Tk), (H, K) = lengths, heads
    sizes = [(B, Tq, H, D), (B, Tk, K, D), (B, Tk, K, D), (B, Tq, H, D)]
    q, k, v, do = (torch.randn(size, device="cuda").to(dtype) for size in sizes)
    return [q, k, v], do


def kernel(**options: Any) -> Callable[..., Tensor]:
    return lambda *a: attention(*a, impl="triton", **options)


def check(tensors: list[Tensor], do: Tensor, dtype: torch.dtype, deterministic: bool = True, **options: Any) -> None:
    true = run(lambda *a: oracle_with_lse(*a, **options)[0], tensors, do, torch.float64)
    plain = run(lambda *a: plain_attention(*a, **options), tensors, do, dtype)
    ours = run(kernel(deterministic=deterministic, **options), tensors, do, dtype)
    if dtype != FP32:
        assert_within_rounding(ours, plain, true, dtype)
        return
    for mine, exact in zip(ours, true, strict=True):  # gradients of few keys cancel: what is left of fp32 varies
        assert (mine - exact).abs().max() <= 1e-5 * exact.abs().max().clamp_min(1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("D", "heads"), HEADS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_attention(lengths: tuple[int, int], D: int, heads: tuple[int, int], dtype: torch.dtype) -> None:
    check(*attention_inputs(lengths, heads, D, dtype), dtype)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("D", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("lengths", LONG, ids=str)
def test_long_attention(lengths: tuple[int, int], D: int, deterministic: bool) -> None:
    dtype = BF16
    check(*attention_inputs(lengths, (2, 1), D, dtype, B=1), dtype, deterministic)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize(("D", "dtype"), MASKED, ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask: str, D: int, dtype: torch.dtype, deterministic: bool) -> None:
    tensors, do = attention_inputs((700, 700), (4, 2), D, dtype)
    check(tensors, do, dtype, deterministic, **on_gpu(MASKS[mask]))


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("lengths", [(1, 700), (130, 700)], ids=str)
@pytest.mark.parametrize("mask", ["window 2", "window", "strided", "softcap"])
def test_masks_while_decoding(mask: str, lengths: tuple[int, int], deterministic: bool) -> None:
    tensors, do = attention_inputs(lengths, (4, 1), 64, BF16)
    check(tensors, do, BF16, deterministic, **on_gpu(MASKS[mask]))


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize(("D", "dtype"), MASKED, ids=str)
def test_a_window_of_one_key(D: int, dtype: torch.dtype, deterministic: bool) -> None:
    """Every query copies its own value: scores have no gradient, which the rule would ask for to the bit."""
    tensors, do = attention_inputs((700, 700), (4, 2), D, dtype)
    o, dq, dk, dv = run(kernel(window=1, deterministic=deterministic), tensors, do, dtype)
    assert torch.equal(o, tensors[2].repeat_interleave(2, 2))
    summed = do.double().unflatten(2, (2, 2)).sum(3)
    assert (dv - summed).abs().max() <= torch.finfo(dtype).eps * summed.abs().max()
    assert max(dq.abs().max(), dk.abs().max()) <= 1e-3


@pytest.mark.parametrize(("D", "dtype"), MASKED, ids=str)
@pytest.mark.parametrize(
    ("lengths", "mask"),
    [((130, 130), None), ((33, 300), None), ((700, 700), "window, documents, softcap"), ((700, 700), "strided")],
    ids=str,
)
def test_dropout(lengths: tuple[int, int], mask: str | None, D: int, dtype: torch.dtype) -> None:
    tensors, do = attention_inputs(lengths, (4, 2), D, dtype)
    options = on_gpu(MASKS[mask] if mask else {}, dropout=True)
    true = run(lambda *a: oracle_with_lse(*a, **options)[0], tensors, do, torch.float64)
    ours = run(kernel(**options), tensors, do, dtype)
    for mine, exact in zip(ours, true, strict=True):  # a wrong mask would be off by the values
        allowed = 4 * torch.finfo(dtype).eps * exact.abs().max() + 1e-5
        assert (mine - exact).abs().max() <= allowed


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize(("D", "dtype"), MASKED, ids=str)
@pytest.mark.parametrize("mask", [None, "window", "documents", "strided", "softcap"])
def test_log_sum(mask: str | None, D: int, dtype: torch.dtype, deterministic: bool) -> None:
    """Its value in fp32 whatever the dtype, and its gradient within one that rounds like the output's."""
    (q, k, v), _ = attention_inputs((700, 700), (4, 2), D, dtype)
    options = on_gpu(MASKS[mask] if mask else {})
    gradient = torch.randn(2, 4, 700, device="cuda")
    true = run(lambda q, k: oracle_with_lse(q, k, v.double(), **options)[1], [q, k], gradient, torch.float64)
    options |= {"impl": "triton", "deterministic": deterministic}
    ours = run(lambda q, k: attention_with_lse(q, k, v, **options)[1], [q, k], gradient, dtype)
    assert ours[0].dtype == torch.float32
    assert (ours[0] - true[0]).abs().max() <= 1e-4
    for mine, exact in zip(ours[1:], true[1:], strict=True):
        assert (mine - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max() + 1e-5


@pytest.mark.parametrize("D", [64, 80, 128])
def test_views(D: int) -> None:
    """Parts of one projection, and views that bulk copies cannot read: odd offsets and odd strides."""
    H, K, T = 4, 2, 300
    fused = torch.randn(2, T, H + 2 * K, D, device="cuda", dtype=BF16)
    odd = [torch.randn(2, T, n, D + 3, device="cuda", dtype=BF16)[..., 1 : D + 1] for n in (H, K, K, H)]
    for *views, do in ([*fused.split([H, K, K], 2), odd[3]], odd):
        leaves = [t.detach().requires_grad_() for t in views]
        o = attention(*leaves, impl="triton")
        ours = [o, *torch.autograd.grad(o, leaves, do)]
        true = run(lambda *a: oracle_with_lse(*a)[0], views, do, torch.float64)
        plain = run(plain_attention, views, do, BF16)
        assert_within_rounding(ours, plain, true, BF16)


@pytest.mark.parametrize("D", [64, 96, 128, 256])
@pytest.mark.parametrize("mask", [None, *MASKS])
def test_the_same_bits_every_time(mask: str | None, D: int) -> None:
    tensors, do = attention_inputs((700, 700), (8, 2), D, BF16)
    options = on_gpu(MASKS[mask] if mask else {}, dropout=mask == "window, documents, softcap")
    assert_repeats(lambda: run(kernel(**options), tensors, do, BF16))


@pytest.mark.parametrize("mask", [None, *MASKS])
def test_nothing_waits_for_the_device(mask: str | None) -> None:
    tensors, do = attention_inputs((700, 700), (4, 2), 64, BF16)
    options = on_gpu(MASKS[mask] if mask else {})
    run(kernel(**options), tensors, do, BF16)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(kernel(**options), tensors, do, BF16)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def tail(results: list[Tensor], dim: int, length: int) -> list[Tensor]:
    return [t.narrow(dim, t.shape[dim] - length, length) for t in results]


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize(
    ("shape", "dim", "window"),
    [((8208, 128, 16, 128), 0, None), ((1, 2**17 + 256, 128, 128), 1, 128)],
    ids=["rows", "positions"],
)
def test_past_31_bits(shape: tuple[int, ...], dim: int, window: int | None, deterministic: bool) -> None:
    """More than 2^31 elements a tensor: the end of the results is that of the end alone."""
    generator = torch.Generator("cuda").manual_seed(0)
    tensors = [torch.randn(shape, generator=generator, device="cuda", dtype=BF16) for _ in range(4)]
    assert tensors[0].numel() > 2**31
    last, compared = (4, 4) if dim == 0 else (256, 128)  # before position 128 of the end, a window would reach out
    function = kernel(window=window, deterministic=deterministic)
    whole = tail(run(function, tensors[:3], tensors[3], BF16), dim, compared)
    end = [t.contiguous() for t in tail(tensors, dim, last)]
    alone = tail(run(function, end[:3], end[3], BF16), dim, compared)
    for mine, theirs in zip(whole, alone, strict=True):
        assert (mine.float() - theirs.float()).abs().max() <= 2**-7 * theirs.float().abs().max()


@pytest.mark.parametrize("mask", [None, *MASKS])
def test_auto_compiles_whole_with_inductor(mask: str | None) -> None:
    tensors, do = attention_inputs((700, 700), (4, 2), 64, BF16)
    options = on_gpu(MASKS[mask] if mask else {})
    eager = run(lambda *a: attention(*a, **options), tensors, do, BF16)
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, **options), fullgraph=True)
    for mine, theirs in zip(run(compiled, tensors, do, BF16), eager, strict=True):
        assert torch.equal(mine, theirs)
