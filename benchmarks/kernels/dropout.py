"""The cases of dropout added to the residual stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.case import Case, Contest, loaders, setups, timed_dtype
from kernels.dropout import dropout
from kernels.philox import DropoutKey

SHAPES = [(16, 1024, 768), (16, 1024, 2048), (8, 2048, 4096)]
SMALL = [(2, 16, 64)]
KEY = DropoutKey(0.1, 1, 2)


def case(device: torch.device, dtype: torch.dtype, B: int, T: int, C: int, *, residual: bool = True) -> Case:
    torch.manual_seed(0)
    tensors = tuple(torch.randn(B, T, C, device=device).to(dtype) for _ in range(1 + residual))
    dy = torch.randn(B, T, C, device=device).to(dtype)
    samples, positions = torch.arange(B, device=device), torch.arange(T, device=device)

    def function(x: Tensor, residual: Tensor | None = None, **options: Any) -> Tensor:
        return dropout(x, KEY, samples, positions, residual=residual, **options)

    return Case(f"B={B} T={T} C={C}{' residual' * residual}", function, tensors, (dy,))


def compiled(dtype: torch.dtype) -> Iterator[Case]:
    """The backward pass is the forward's kernel without a residual."""
    for C in (768, 1600, 8192):
        yield case(torch.device("cpu"), dtype, 2, 24, C)


def contests(device: torch.device, small: bool) -> Iterator[Contest]:
    for B, T, C in SMALL if small else SHAPES:
        given = case(device, timed_dtype(small), B, T, C)
        found = loaders(given) | {"torch": lambda: stock, "torch.compile": lambda: torch.compile(stock)}
        moved = 3 * B * T * C * timed_dtype(small).itemsize
        yield Contest(
            "dropout", "forward", given.name, "width", C, timed_dtype(small), moved, setups(given, "forward", found),
            unlike=frozenset({"torch", "torch.compile"}),
        )  # fmt: skip


def stock(x: Tensor, residual: Tensor) -> Tensor:
    """PyTorch's own draws other masks, which depend on the layout: it is about speed alone."""
    return residual + F.dropout(x, KEY.p)
