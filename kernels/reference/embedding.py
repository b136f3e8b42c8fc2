"""Table look-up in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.reference.wide import wide


def embedding(tokens: Tensor, weight: Tensor, zero_outside: bool = False) -> Tensor:
    """Rows of weight [V, C] by number: int [...] -> [..., C]; see kernels.embedding.embedding."""
    if not zero_outside:
        return wide(weight)[tokens].to(weight.dtype)  # wide: the sum of gradients is rounded once
    inside = (tokens >= 0) & (tokens < len(weight))
    rows = wide(weight)[tokens.where(inside, 0)]
    return torch.where(inside.unsqueeze(-1), rows, 0.0).to(weight.dtype)
