"""Compiled rotary position encoding on a GPU (`make test-gpu`), forward and backward."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernels.rope import case
from kernels.rope import rope_qkv
from rounding import DTYPES, GPU, GPU_ONLY, check, check_repeats_and_compiles

pytestmark = GPU_ONLY


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [24, 64, 80, 128, 256])
@pytest.mark.parametrize(("B", "T", "K", "R"), [(1, 1, 5, 1), (2, 199, 5, 1), (2, 1024, 12, 1), (1, 1000, 2, 4)])
@pytest.mark.parametrize("first", [0, 1_000_000])
def test_rope_qkv(first: int, B: int, T: int, K: int, R: int, D: int, dtype: torch.dtype) -> None:
    example = case(GPU, dtype, B, T, K, R, D, first=first)
    check(example, dtype)


def test_repeats_and_compiles_whole() -> None:
    check_repeats_and_compiles(case(GPU, torch.bfloat16, 2, 500, 12, 1, 64))


def test_past_two_to_the_31_elements() -> None:
    B, T, K, D = 2, 2**16 + 5, 48, 128
    qkv = torch.zeros(B, T, 3 * K * D, device="cuda", dtype=torch.bfloat16)
    qkv[-1, -1] = torch.randn(3 * K * D, device="cuda")
    positions = torch.arange(T, device="cuda")
    out = rope_qkv(qkv.requires_grad_(), positions, n_kv_head=K, head_dim=D, impl="triton")
    last = qkv[-1:, -1:].detach().requires_grad_()
    expected = rope_qkv(last, positions[-1:], n_kv_head=K, head_dim=D, impl="triton")
    for mine, theirs in zip(out, expected, strict=True):
        assert torch.equal(mine[-1:, -1:], theirs)
        assert not mine[0].any()
    ones = [torch.ones(D, device="cuda", dtype=torch.bfloat16).expand_as(o) for o in out]
    (mine,) = torch.autograd.grad(out, qkv, ones)
    (theirs,) = torch.autograd.grad(expected, last, [one[-1:, -1:] for one in ones])
    assert torch.equal(mine[-1:, -1:], theirs)
