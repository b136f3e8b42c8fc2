"""SwiGLU's product in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.reference.wide import wide


def swiglu(x: Tensor, layout: str = "alternating") -> Tensor:
    """gate * sigmoid(gate) * up; x [..., 2 F] -> [..., F]; see kernels.swiglu.swiglu."""
    F = x.shape[-1] // 2
    channels = wide(x)
    if layout == "alternating":
        gate, up = channels[..., 0::2], channels[..., 1::2]
    else:
        gate, up = channels[..., :F], channels[..., F:]
    return (gate * torch.sigmoid(gate) * up).to(x.dtype)
