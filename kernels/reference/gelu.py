"""GELU after a bias in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.reference.wide import wide


def bias_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    """0.5 z (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3))) with z = x + bias; x [..., F], bias [F] or None."""
    z = wide(x) if bias is None else wide(x) + wide(bias)
    return (0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))).to(x.dtype)
