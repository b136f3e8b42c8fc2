"""Norms in plain PyTorch, alone and after the residual addition."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dispatch import wide
from kernels.philox import DropoutKey
from kernels.philox import dropout as dropped


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension."""
    rows = wide(x)  # once: each cast would round its own part of the gradient
    centred = rows - rows.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * wide(weight)
    return (y if bias is None else y + wide(bias)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    rows = wide(x)
    return (rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps) * wide(weight)).to(x.dtype)


def add(
    x: Tensor, residual: Tensor, key: DropoutKey | None, samples: Tensor | None, positions: Tensor | None
) -> Tensor:
    """residual + dropout(x), in the dtype of residual."""
    x = wide(x)
    if key is not None and samples is not None and positions is not None:
        x = dropped(x, key, samples, positions)
    return (wide(residual) + x).to(residual.dtype)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5,
    dropout: DropoutKey | None = None, samples: Tensor | None = None, positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(layer_norm(stream), stream) with stream = residual + dropout(x); see kernels.norm.add_layer_norm."""
    stream = add(x, residual, dropout, samples, positions)
    return layer_norm(stream, weight, bias, eps), stream


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5,
    dropout: DropoutKey | None = None, samples: Tensor | None = None, positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(rms_norm(stream), stream) with stream = residual + dropout(x)."""
    stream = add(x, residual, dropout, samples, positions)
    return rms_norm(stream, weight, eps), stream
