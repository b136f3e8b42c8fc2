"""Rotary position encoding and the split of qkv: reads qkv once and writes it once, each way.

Rivals that turn q and k alone leave v a view of qkv: a third less to move, but qkv stays in memory for the backward.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.case import BenchCase, Setup, Thunk
from benchmarks.kernels.swiglu import timed
from kernels.rope import frequencies_of, rope_qkv

# B, T, K, R, D: the GPT presets of 124M, 350M, 1.3B and 6.7B, and grouped queries.
SHAPES = [
    (16, 1024, 12, 1, 64),
    (16, 1024, 16, 1, 64),
    (8, 2048, 16, 1, 128),
    (4, 4096, 32, 1, 128),
    (2, 8192, 8, 4, 128),
]
SMALL = [(2, 16, 2, 2, 8)]
UNLIKE = frozenset({"Liger", "flash_attn in place"})


def cases(device: torch.device, small: bool) -> Iterator[BenchCase]:
    dtype = torch.float32 if small else torch.bfloat16
    for shape in SMALL if small else SHAPES:
        B, T, K, R, D = shape
        for part in ("forward", "backward"):
            qkv = torch.randn(B, T, K * (R + 2) * D, device=device, dtype=dtype)
            gradients = [torch.randn(B, T, n, D, device=device, dtype=dtype) for n in (K * R, K, K)]
            name = f"B={B} T={T} H={K * R} K={K} D={D}"
            moved = 2 * qkv.numel() * dtype.itemsize
            rivals = _rivals(qkv, gradients, shape, part) | _in_place(qkv, gradients, shape, part)
            yield BenchCase(
                "rope", part, name, "width", qkv.shape[-1], str(dtype)[6:], 0.0, moved, rivals, unlike=UNLIKE
            )


def _rivals(qkv: Tensor, gradients: list[Tensor], shape: tuple[int, ...], part: str) -> dict[str, Setup]:
    _, T, K, R, D = shape
    positions = torch.arange(T, device=qkv.device)

    def form(impl: str) -> Callable[[Tensor], Any]:
        return lambda qkv: rope_qkv(qkv, positions, n_kv_head=K, head_dim=D, impl=impl)

    def flash_attn() -> Thunk:
        """Two kernels, for q and k; sine and cosine come from a table."""
        turn = importlib.import_module("flash_attn.layers.rotary").apply_rotary_emb
        cos, sin = tables(positions, D)

        def function(qkv: Tensor) -> tuple[Tensor, ...]:
            heads = qkv.unflatten(-1, (K, R + 2, D))
            q, k = heads[:, :, :, :R].flatten(2, 3), heads[:, :, :, R]
            return turn(q, cos, sin), turn(k, cos, sin), heads[:, :, :, R + 1]

        return timed(function, part, [qkv], gradients)

    ours = form("triton" if qkv.is_cuda else "torch")
    return {
        "ingot": lambda: timed(ours, part, [qkv], gradients),
        "reference": lambda: timed(form("reference"), part, [qkv], gradients),
        "torch": lambda: timed(form("torch"), part, [qkv], gradients),
        "torch.compile": lambda: timed(torch.compile(form("torch")), part, [qkv], gradients),
        "flash_attn": flash_attn,
    }


def _in_place(qkv: Tensor, gradients: list[Tensor], shape: tuple[int, ...], part: str) -> dict[str, Setup]:
    """Rivals that turn q and k where they stand, each call further, after a split that is not timed."""
    B, T, K, R, D = shape
    positions = torch.arange(T, device=qkv.device)

    def liger() -> Thunk:
        turn = importlib.import_module("liger_kernel.ops.rope").LigerRopeFunction.apply
        cos, sin = (table.repeat(1, 2)[None] for table in tables(positions, D))
        q, k = (torch.randn_like(g).transpose(1, 2) for g in gradients[:2])
        turned = [g.clone().transpose(1, 2) for g in gradients[:2]]
        return timed(lambda q, k: turn(q, k, cos, sin)[:2], part, [q, k], turned)

    def flash_attn() -> Thunk:
        turn = importlib.import_module("flash_attn.layers.rotary").apply_rotary_emb_qkv_
        cos, sin = tables(positions, D)
        heads = qkv.clone().view(B, T, K * (R + 2), D)
        return timed(lambda qkv: turn(qkv, cos, sin, num_heads_q=K * R), part, [heads], [])

    return {"Liger": liger} | ({"flash_attn in place": flash_attn} if part == "forward" else {})


def tables(positions: Tensor, D: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angles, fp32 [T, D/2]."""
    angles = positions.float()[:, None] * frequencies_of(D, 10000.0, positions.device)
    return angles.cos(), angles.sin()
