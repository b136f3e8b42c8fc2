"""The precision that references compute in."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in at least float32."""
    return x if x.dtype == torch.float64 else x.float()
