"""Dropout added to the residual stream."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks.kernels.case import BenchCase, Setup
from kernels.dropout import dropout
from kernels.philox import DropoutKey

SHAPES = [(16, 1024, 768), (16, 1024, 2048), (8, 2048, 4096)]
SMALL = [(2, 16, 64)]
UNLIKE = frozenset({"torch", "torch.compile"})  # they draw masks of their own


def cases(device: torch.device, small: bool) -> Iterator[BenchCase]:
    dtype = torch.float32 if small else torch.bfloat16
    for B, T, C in SMALL if small else SHAPES:
        name = f"B={B} T={T} C={C}"
        moved = 3 * B * T * C * dtype.itemsize
        rivals = _rivals(device, (B, T, C), dtype)
        yield BenchCase("dropout", "forward", name, "width", C, str(dtype)[6:], 0.0, moved, rivals, unlike=UNLIKE)


def _rivals(device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Setup]:
    """PyTorch's own dropout draws other masks, which depend on the layout: its row is about speed alone."""
    x, residual = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
    samples, positions = torch.arange(shape[0], device=device), torch.arange(shape[1], device=device)
    key = DropoutKey(0.1, 1, 2)

    def form(impl: str) -> Setup:
        return lambda: lambda: dropout(x, key, samples, positions, residual=residual, impl=impl)

    def stock() -> torch.Tensor:
        return residual + F.dropout(x, key.p)

    return {
        "ingot": form("triton" if device.type == "cuda" else "torch"),
        "reference": form("reference"),
        "torch": lambda: stock,
        "torch.compile": lambda: torch.compile(stock),
    }
