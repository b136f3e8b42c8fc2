"""Compiled attention on a GPU (`make test-gpu`), forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.attention import attention
from kernels.philox import DropoutKey
from rounding import DTYPES, GPU_ONLY, assert_repeats, assert_within_rounding, run

pytestmark = GPU_ONLY
KEY = DropoutKey(0.2, 2**32 - 5, 7)
# (Tq, Tk), after FlashAttention's own list where Tq <= Tk
LENGTHS = [
    (1, 1), (64, 128), (128, 192), (239, 239), (113, 203), (108, 256), (1, 300), (1023, 1024),
    (1024, 1024),
]  # fmt: skip


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with every step in the dtype of q: what rounding alone costs."""
    Tq, Tk, repeats = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(repeats, 2) for t in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    hidden = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).triu(Tk - Tq + 1)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v)


def attention_inputs(
    lengths: tuple[int, int], heads: tuple[int, int], D: int, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    (Tq, Tk), (H, K) = lengths, heads
    sizes = [(2, Tq, H, D), (2, Tk, K, D), (2, Tk, K, D), (2, Tq, H, D)]
    q, k, v, do = (torch.randn(size, device="cuda").to(dtype) for size in sizes)
    return [q, k, v], do


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)], ids=str)
@pytest.mark.parametrize("D", [16, 32, 40, 64, 96, 128, 256])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_attention(lengths: tuple[int, int], D: int, heads: tuple[int, int], dtype: torch.dtype) -> None:
    tensors, do = attention_inputs(lengths, heads, D, dtype)
    true = run(reference.attention, tensors, do, torch.float64)
    plain = run(plain_attention, tensors, do, dtype)
    ours = run(lambda *a: attention(*a, impl="triton"), tensors, do, dtype)
    assert_within_rounding(ours, plain, true, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [40, 64, 128, 256])
@pytest.mark.parametrize("lengths", [(130, 130), (33, 300)], ids=str)
def test_attention_with_dropout(lengths: tuple[int, int], D: int, dtype: torch.dtype) -> None:
    tensors, do = attention_inputs(lengths, (4, 2), D, dtype)
    samples = torch.tensor([2**33 + 5, 0], device="cuda")
    options = {"dropout": KEY, "samples": samples, "head_offset": 3}
    true = run(lambda *a: reference.attention(*a, **options), tensors, do, torch.float64)
    ours = run(lambda *a: attention(*a, impl="triton", **options), tensors, do, dtype)
    for mine, exact in zip(ours, true, strict=True):  # a wrong mask would be off by the values
        allowed = 4 * torch.finfo(dtype).eps * exact.abs().max() + 1e-5
        assert (mine - exact).abs().max() <= allowed


def test_attention_gives_the_same_bits_every_time() -> None:
    tensors, do = attention_inputs((500, 500), (8, 2), 64, torch.bfloat16)
    assert_repeats(lambda: run(lambda *a: attention(*a, impl="triton"), tensors, do, torch.bfloat16))


def test_auto_compiles_whole_with_inductor() -> None:
    tensors, do = attention_inputs((64, 64), (4, 2), 64, torch.bfloat16)
    eager = run(lambda *a: attention(*a), tensors, do, torch.bfloat16)
    compiled = torch.compile(lambda q, k, v: attention(q, k, v), fullgraph=True)
    for mine, theirs in zip(run(compiled, tensors, do, torch.bfloat16), eager, strict=True):
        assert torch.equal(mine, theirs)
