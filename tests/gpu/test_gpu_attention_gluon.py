"""Attention's Gluon kernels on a Hopper GPU (`make test-gpu`): every mask, forward and backward."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from kernels.attention import attention, attention_packed, attention_with_lse
from kernels.attention.reference import attention_with_lse as oracle_with_lse
from rounding import GPU_ONLY, assert_repeats, assert_within_rounding, run
from test_gpu_attention import MASKS, attention_inputs, on_gpu, plain_attention

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [*GPU_ONLY, pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")]
BF16, FP16 = torch.bfloat16, torch.float16
# A part of a tile, whole tiles, one row more and less than that, and more tiles than stages several times over.
LENGTHS = [1, 63, 64, 65, 127, 128, 129, 255, 256, 257, 640, 700, 1023, 1024, 1025]
TAKEN = {name: mask for name, mask in MASKS.items() if mask.keys() <= {"window", "documents"}}
TAKEN["window of one key"] = {"window": 1}


def check(T: int, heads: tuple[int, int], D: int, dtype: torch.dtype, B: int = 2, **options: Any) -> None:
    tensors, do = attention_inputs((T, T), heads, D, dtype, B)
    true = run(lambda *a: oracle_with_lse(*a, **options)[0], tensors, do, torch.float64)
    plain = run(lambda *a: plain_attention(*a, **options), tensors, do, dtype)
    assert_within_rounding(run(partial(attention, impl="gluon", **options), tensors, do, dtype), plain, true, dtype)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (5, 1)], ids=str)
@pytest.mark.parametrize("T", LENGTHS)
def test_attention(T: int, heads: tuple[int, int], D: int, dtype: torch.dtype) -> None:
    check(T, heads, D, dtype)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("T", [4096, 4224, 5001])
def test_long_attention(T: int, D: int) -> None:
    check(T, (2, 1), D, BF16, B=1)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("mask", [name for name in TAKEN if name != "window of one key"])
def test_masks(mask: str, D: int, dtype: torch.dtype) -> None:
    check(700, (4, 2), D, dtype, **on_gpu(TAKEN[mask]))


@pytest.mark.parametrize("D", [64, 128])
def test_a_window_of_one_key(D: int) -> None:
    """Every query copies its own value: scores have no gradient, which the rule would ask for to the bit."""
    tensors, do = attention_inputs((700, 700), (4, 2), D, BF16)
    o, dq, dk, dv = run(partial(attention, impl="gluon", window=1), tensors, do, BF16)
    assert torch.equal(o, tensors[2].repeat_interleave(2, 2))
    summed = do.double().unflatten(2, (2, 2)).sum(3)
    assert (dv - summed).abs().max() <= torch.finfo(BF16).eps * summed.abs().max()
    assert max(dq.abs().max(), dk.abs().max()) <= 1e-3


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("mask", [None, *TAKEN])
def test_log_sum(mask: str | None, D: int) -> None:
    """Its value in fp32 whatever the dtype, and its gradient within one that rounds like the output's."""
    (q, k, v), _ = attention_inputs((700, 700), (4, 2), D, BF16)
    options = on_gpu(TAKEN[mask] if mask else {})
    gradient = torch.randn(2, 4, 700, device="cuda")
    true = run(lambda q, k: oracle_with_lse(q, k, v.double(), **options)[1], [q, k], gradient, torch.float64)
    ours = run(lambda q, k: attention_with_lse(q, k, v, impl="gluon", **options)[1], [q, k], gradient, BF16)
    assert (ours[0] - true[0]).abs().max() <= 1e-4
    for mine, exact in zip(ours[1:], true[1:], strict=True):
        assert (mine - exact).abs().max() <= 4 * torch.finfo(BF16).eps * exact.abs().max() + 1e-5


@pytest.mark.parametrize("D", [64, 128])
def test_parts_of_one_projection(D: int) -> None:
    """The same bits as those of separate tensors, from views and from the packed tensor."""
    H, K, T = 4, 2, 300
    fused = torch.randn(2, T, H + 2 * K, D, device="cuda", dtype=BF16)
    views, do = fused.split([H, K, K], 2), torch.randn(2, T, H, D, device="cuda", dtype=BF16)
    function = partial(attention, impl="gluon")
    for mine, theirs in zip(
        run(function, views, do, BF16), run(function, [x.contiguous() for x in views], do, BF16), strict=True
    ):
        assert torch.equal(mine, theirs)
    qkv = torch.randn(2, T, H, 3, D, device="cuda", dtype=BF16).requires_grad_()
    o = attention_packed(qkv, impl="gluon")
    parts = run(function, qkv.detach().unbind(3), do, BF16)
    assert torch.equal(o, parts[0])
    assert torch.equal(torch.autograd.grad(o, qkv, do)[0], torch.stack(parts[1:], 3))


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("mask", [None, *TAKEN])
def test_the_same_bits_every_time(mask: str | None, D: int) -> None:
    """A race of barriers would show here if anywhere."""
    tensors, do = attention_inputs((1100, 1100), (8, 2), D, BF16)
    options = on_gpu({name: x for name, x in TAKEN[mask].items() if name != "documents"} if mask else {})
    if mask and "documents" in TAKEN[mask]:
        options["cu_seqlens"] = torch.tensor([0, 1, 130, 600, 1399, 2200], dtype=torch.int32, device="cuda")
    assert_repeats(lambda: run(partial(attention, impl="gluon", **options), tensors, do, BF16))


@pytest.mark.parametrize("mask", [None, *TAKEN])
def test_nothing_waits_for_the_device(mask: str | None) -> None:
    tensors, do = attention_inputs((700, 700), (4, 2), 64, BF16)
    options = on_gpu(TAKEN[mask] if mask else {})
    function = partial(attention, impl="gluon", **options)
    run(function, tensors, do, BF16)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(function, tensors, do, BF16)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("D", [64, 128])
def test_compiles_whole_with_inductor(D: int) -> None:
    tensors, do = attention_inputs((700, 700), (4, 2), D, BF16)
    function = partial(attention, impl="gluon")
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, impl="gluon"), fullgraph=True)
    for mine, theirs in zip(run(compiled, tensors, do, BF16), run(function, tensors, do, BF16), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("D", [64, 128])
def test_two_streams_at_once(D: int) -> None:
    """Programs of two launches share multiprocessors: their barriers must not."""
    tensors, do = attention_inputs((1000, 1000), (4, 2), D, BF16)
    expected = run(partial(attention, impl="gluon"), tensors, do, BF16)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    found = []
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(run(partial(attention, impl="gluon"), tensors, do, BF16))
    torch.cuda.synchronize()
    for results in found:
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
