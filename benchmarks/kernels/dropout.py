"""The cases of dropout added to the residual stream."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.case import Case, Contest, loaders, normal, setups, timed_dtype
from kernels.dropout import dropout
from kernels.philox import DropoutKey

SHAPES = [(16, 1024, 768), (16, 1024, 2048), (8, 2048, 4096)]
SMALL = [(2, 16, 64)]
KEY = DropoutKey(0.1, 1, 2)


def case(device: torch.device, dtype: torch.dtype, B: int, T: int, C: int) -> Case:
    x, residual, dy = normal(device, dtype, *[(B, T, C)] * 3)
    samples, positions = torch.arange(B, device=device), torch.arange(T, device=device)

    def function(x: Tensor, residual: Tensor, impl: str) -> Tensor:
        return dropout(x, KEY, samples, positions, residual=residual, impl=impl)

    return Case(f"B={B} T={T} C={C} residual", function, (x, residual), (dy,))


def compiled(dtype: torch.dtype) -> Iterator[Case]:
    """The backward pass is the forward's kernel without a residual."""
    for C in (768, 1600, 8192):
        yield case(torch.device("cpu"), dtype, 2, 24, C)


def contests(device: torch.device, small: bool) -> Iterator[Contest]:
    for B, T, C in SMALL if small else SHAPES:
        given = case(device, timed_dtype(small), B, T, C)
        x, rivals = given.tensors[0], setups(given, "forward", loaders(given, stock))
        unlike = frozenset({"torch", "torch.compile"})
        yield Contest("dropout", "forward", given.name, "width", C, x.dtype, 3 * x.nbytes, rivals, unlike=unlike)


def stock(x: Tensor, residual: Tensor) -> Tensor:
    """PyTorch's own draws other masks, which depend on the layout: it is about speed alone."""
    return residual + F.dropout(x, KEY.p)
