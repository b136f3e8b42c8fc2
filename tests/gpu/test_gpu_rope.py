"""Compiled rotary position encoding on a GPU (`make test-gpu`), forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.rope import rope, rope_qkv
from rounding import DTYPES, GPU_ONLY, assert_repeats, assert_within_rounding, run

pytestmark = GPU_ONLY


def joined(positions: Tensor, K: int, D: int, impl: str, **options: Any) -> Callable[[Tensor], Tensor]:
    """q, k and v along one dimension, so that they make one output."""
    return lambda qkv: torch.cat(rope_qkv(qkv, positions, n_kv_head=K, head_dim=D, impl=impl, **options), dim=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [24, 64, 80, 128, 256])
@pytest.mark.parametrize(("B", "T", "K", "R"), [(1, 1, 5, 1), (2, 199, 5, 1), (2, 1024, 12, 1), (1, 1000, 2, 4)])
@pytest.mark.parametrize("first", [0, 1_000_000])
def test_rope_qkv(
    first: int, B: int, T: int, K: int, R: int, D: int, dtype: torch.dtype
) -> None:  # fmt: skip
    torch.manual_seed(0)
    qkv = torch.randn(B, T, K * (R + 2) * D, device="cuda").to(dtype)
    gradient = torch.randn(B, T, K * (R + 2), D, device="cuda").to(dtype)
    positions = torch.arange(T, device="cuda") + first
    true = run(joined(positions, K, D, "reference"), [qkv], gradient, torch.float64)
    plain = run(joined(positions, K, D, "torch"), [qkv], gradient, dtype)
    ours = run(joined(positions, K, D, "triton"), [qkv], gradient, dtype)
    assert_within_rounding(ours, plain, true, dtype)
    q = qkv.unflatten(-1, (K, R + 2, D))[:, :, :, :R].flatten(2, 3)
    assert torch.equal(rope(q, positions, impl="triton"), ours[0][:, :, : K * R])


def test_repeats_and_compiles_whole() -> None:
    qkv, gradient = torch.randn(2, 500, 3 * 768, device="cuda"), torch.randn(2, 500, 36, 64, device="cuda")
    function = joined(torch.arange(500, device="cuda"), 12, 64, "triton")
    eager = run(function, [qkv], gradient, torch.bfloat16)
    assert_repeats(lambda: run(function, [qkv], gradient, torch.bfloat16))
    compiled = run(torch.compile(function, fullgraph=True), [qkv], gradient, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(compiled, eager, strict=True))


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
