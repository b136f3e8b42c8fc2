"""The cases of rotary position encoding with the split of qkv. Each pass reads qkv once and writes it once.

Rivals that rotate q and k alone leave v as a view of qkv. They move a third less, but keep qkv for the backward pass.
"""

from collections.abc import Iterator
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.case import Case, Contest, Function, loaders, normal, setups, timed, timed_dtype
from kernels.rope import rope_qkv

# B, T, K, R, D: the GPT presets of 124M, 350M, 1.3B and 6.7B, and grouped queries.
SHAPES = [
    (16, 1024, 12, 1, 64), (16, 1024, 16, 1, 64), (8, 2048, 16, 1, 128), (4, 4096, 32, 1, 128), (2, 8192, 8, 4, 128),
]  # fmt: skip
SMALL = [(2, 16, 2, 2, 8)]
HEAD_WIDTHS = (64, 80, 128, 256)  # whose kernels are compiled
THETA = 10000.0


def case(
    device: torch.device, dtype: torch.dtype, B: int, T: int, K: int, R: int, D: int, *, first: int = 0
) -> Case:  # fmt: skip
    """first: the position where the rows begin."""
    outputs = [(B, T, heads, D) for heads in (K * R, K, K)]
    qkv, *gradients = normal(device, dtype, (B, T, K * (R + 2) * D), *outputs)
    positions = torch.arange(T, device=device) + first

    def function(qkv: Tensor, **options: Any) -> tuple[Tensor, ...]:
        return rope_qkv(qkv, positions, n_kv_head=K, head_dim=D, theta=THETA, **options)

    return Case(
        f"B={B} T={T} H={K * R} K={K} D={D}", function, (qkv,), tuple(gradients), may_spill=dtype == torch.float32
    )


def compiled(dtype: torch.dtype) -> Iterator[Case]:
    for D in HEAD_WIDTHS:
        yield case(torch.device("cpu"), dtype, 2, 24, 2, 3, D)


def contests(device: torch.device, small: bool) -> Iterator[Contest]:
    for shape in SMALL if small else SHAPES:
        given = case(device, timed_dtype(small), *shape)
        (qkv,) = given.tensors
        for part in ("forward", "backward"):
            rivals = setups(given, part, loaders(given) | {"flash_attn": lambda shape=shape: flash_attn(device, shape)})
            q, k, dq, dk = (g.clone().transpose(1, 2) for g in given.gradients[:2] * 2)
            rivals["Liger"] = partial(timed, part, partial(liger, device, shape), [q, k], [dq, dk])
            yield Contest(
                "rope", part, given.name, "width", qkv.shape[-1], qkv.dtype, 2 * qkv.numel() * qkv.itemsize, rivals,
                unlike=frozenset({"Liger"}),
            )  # fmt: skip


def flash_attn(device: torch.device, shape: tuple[int, ...]) -> Function:
    """Two kernels, for q and k; sine and cosine come from a table."""
    _, T, K, R, D = shape
    turn = import_module("flash_attn.layers.rotary").apply_rotary_emb
    cos, sin = tables(T, D, device)

    def function(qkv: Tensor) -> tuple[Tensor, ...]:
        heads = qkv.unflatten(-1, (K, R + 2, D))
        q, k = heads[:, :, :, :R].flatten(2, 3), heads[:, :, :, R]
        return turn(q, cos, sin), turn(k, cos, sin), heads[:, :, :, R + 1]

    return function


def liger(device: torch.device, shape: tuple[int, ...]) -> Function:
    """Turns q and k where they stand, each call further, after a split that is not timed."""
    turn: Any = import_module("liger_kernel.ops.rope").LigerRopeFunction.apply
    cos, sin = (table.repeat(1, 2)[None] for table in tables(shape[1], shape[4], device))
    return lambda q, k: turn(q, k, cos, sin)[:2]


def tables(T: int, D: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angles, fp32 [T, D/2]."""
    frequencies = THETA ** (-torch.arange(0, D, 2, device=device, dtype=torch.float32) / D)
    angles = torch.arange(T, device=device)[:, None] * frequencies
    return angles.cos(), angles.sin()
