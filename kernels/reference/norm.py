"""Normalisation in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.reference.wide import wide


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension."""
    rows = wide(x)  # once: each cast would round its own part of the gradient
    centred = rows - rows.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * wide(weight)
    return (y if bias is None else y + wide(bias)).to(x.dtype)
