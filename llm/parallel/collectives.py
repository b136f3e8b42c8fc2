"""Collectives as functions that you see where they act: no hook communicates.

They are made of torch's functional collectives, operators with fake kernels that torch.compile can trace. Each one
starts at once, and `wait` waits for its result, so that arithmetic can be put between the two. A process group is given
by its name, so that all are functions of tensors and constants.

The autograd functions are the conjugate pairs of Shoeybi et al. 2019 (f, g) and Korthikanti et al. 2022
(`gather_sequence`, `scatter_sequence`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Registers the operators torch.ops._c10d_functional.
from torch.distributed import _functional_collectives  # noqa: F401


def start_all_reduce_(x: Tensor, group: str) -> Tensor:
    """The sum of x, contiguous, over the ranks of `group`, once waited for, in the memory of x."""
    return torch.ops._c10d_functional.all_reduce_(x, "sum", group)


def start_all_gather(x: Tensor, size: int, group: str) -> Tensor:
    """[n, ...] on each of the `size` ranks of `group` -> [size n, ...] in rank order, once waited for."""
    return torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), size, group)


def start_reduce_scatter(x: Tensor, size: int, group: str) -> Tensor:
    """[size n, ...], summed over the ranks of `group` -> this rank's [n, ...], once waited for."""
    return torch.ops._c10d_functional.reduce_scatter_tensor(x.contiguous(), "sum", size, group)


def wait(pending: Tensor) -> Tensor:
    """The result of a collective that was started: it may be used from here on."""
    return torch.ops._c10d_functional.wait_tensor(pending)


def all_reduce(x: Tensor, reduction: str, group: str) -> Tensor:
    """x reduced ("sum" or "max") over the ranks of `group`; same shape and dtype."""
    return wait(torch.ops._c10d_functional.all_reduce(x.contiguous(), reduction, group))


def all_gather(x: Tensor, size: int, group: str) -> Tensor:
    """[...] on each of the `size` ranks of `group` -> [size, ...] in rank order."""
    return wait(start_all_gather(x.unsqueeze(0), size, group))


def sequence_first(x: Tensor, size: int) -> Tensor:
    """[B, T, C] -> [size B, T / size, C]: one part of the sequence after the other, as a reduce-scatter cuts them."""
    return torch.cat(x.chunk(size, dim=1))


def batch_first(x: Tensor, size: int) -> Tensor:
    """The inverse of `sequence_first`: [size B, T / size, C], as an all-gather joins them -> [B, T, C]."""
    return torch.cat(x.chunk(size), dim=1)


class CopyToTensorParallel(torch.autograd.Function):
    """f: identity forward, all-reduce backward.

    For a replicated tensor of which each rank makes a part of the result: an activation that enters a split layer, or a
    weight that is applied to a part of the sequence.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad, "sum", ctx.group), None


class ReduceFromTensorParallel(torch.autograd.Function):
    """g: all-reduce forward, identity backward, for an activation of which each rank holds a partial sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        return all_reduce(x, "sum", group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class GatherSequence(torch.autograd.Function):
    """All-gather along the sequence forward, reduce-scatter backward: f for activations that are split by T."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, group: str) -> Tensor:
        ctx.size, ctx.group = size, group
        return batch_first(wait(start_all_gather(x, size, group)), size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return wait(start_reduce_scatter(sequence_first(grad, ctx.size), ctx.size, ctx.group)), None, None


class ScatterSequence(torch.autograd.Function):
    """Reduce-scatter along the sequence forward, all-gather backward: g for activations that are split by T."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, group: str) -> Tensor:
        ctx.size, ctx.group = size, group
        return wait(start_reduce_scatter(sequence_first(x, size), size, group))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return batch_first(wait(start_all_gather(grad, ctx.size, ctx.group)), ctx.size), None, None


def f(x: Tensor, group: str) -> Tensor:
    """x; its gradient is summed over the ranks of `group`."""
    return CopyToTensorParallel.apply(x, group)  # pyright: ignore[reportReturnType]


def g(x: Tensor, group: str) -> Tensor:
    """The sum of x over the ranks of `group`."""
    return ReduceFromTensorParallel.apply(x, group)  # pyright: ignore[reportReturnType]


def gather_sequence(x: Tensor, size: int, group: str) -> Tensor:
    """[B, T / size, C] on each of the `size` ranks of `group` -> [B, T, C]."""
    return GatherSequence.apply(x, size, group)  # pyright: ignore[reportReturnType]


def scatter_sequence(x: Tensor, size: int, group: str) -> Tensor:
    """The sum of x [B, T, C] over the `size` ranks of `group`, of which each keeps its [B, T / size, C]."""
    return ScatterSequence.apply(x, size, group)  # pyright: ignore[reportReturnType]
