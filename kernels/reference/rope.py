"""Rotary position encoding in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.reference.wide import wide


def rope(x: Tensor, positions: Tensor, *, theta: float = 10000.0, layout: str = "half") -> Tensor:
    """Pair i of each head turned by position * theta^(-2i/D), an angle in fp32.

    x [B, T, ..., D], positions [T] or [B, T] -> the same shape; see kernels.rope.rope.
    """
    D = x.shape[-1]
    frequencies = theta ** (-torch.arange(0, D, 2, device=x.device, dtype=torch.float32) / D)
    angles = (positions.float()[..., None] * frequencies).to(wide(x).dtype)  # [(B,) T, D/2]
    angles = angles.reshape(*positions.shape, *[1] * (x.dim() - 3), D // 2)
    cos, sin = angles.cos(), angles.sin()
    if layout == "half":
        a, b = wide(x).chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)
    a, b = wide(x)[..., 0::2], wide(x)[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)


def rope_qkv(
    qkv: Tensor,
    positions: Tensor,
    *,
    n_kv_head: int,
    head_dim: int,
    theta: float = 10000.0,
    layout: str = "half",
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [B, T, (R + 2) K D] -> q [B, T, K R, D], k, v [B, T, K, D]; see kernels.rope.rope_qkv."""
    R = qkv.shape[-1] // (n_kv_head * head_dim) - 2
    heads = qkv.unflatten(-1, (n_kv_head, R + 2, head_dim))
    q, k, v = heads[:, :, :, :R].flatten(2, 3), heads[:, :, :, R], heads[:, :, :, R + 1]
    return rope(q, positions, theta=theta, layout=layout), rope(k, positions, theta=theta, layout=layout), v
