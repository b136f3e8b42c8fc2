"""Collectives as functions that you see where they act: no hook communicates.

They are made of torch's functional collectives, operators with fake kernels that torch.compile can trace. Each one
starts at once, and `wait` waits for its result, so that arithmetic can be put between the two. A process group is given
by its name, so that all are functions of tensors and constants. `waits`: a context, such as a stopwatch, in which this
rank waits.

The autograd functions are the conjugate pairs of Shoeybi et al. 2019 (f, g) and Korthikanti et al. 2022
(`gather_sequence`, `scatter_sequence`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor

# Registers the operators torch.ops._c10d_functional.
from torch.distributed import _functional_collectives  # noqa: F401

Waits: TypeAlias = AbstractContextManager[object]
UNTIMED = nullcontext()


def start_all_reduce_(x: Tensor, group: str) -> Tensor:
    """The sum of x, contiguous, over the ranks of `group`, once waited for, in the memory of x."""
    if torch.compiler.is_compiling():  # which makes it in place again, and cannot trace one that is
        return torch.ops._c10d_functional.all_reduce(x, "sum", group)
    return torch.ops._c10d_functional.all_reduce_(x, "sum", group)


def start_all_gather(x: Tensor, size: int, group: str) -> Tensor:
    """[n, ...] on each of the `size` ranks of `group` -> [size n, ...] in rank order, once waited for."""
    return torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), size, group)


def start_reduce_scatter(x: Tensor, size: int, group: str) -> Tensor:
    """[size n, ...], summed over the ranks of `group` -> this rank's [n, ...], once waited for."""
    return torch.ops._c10d_functional.reduce_scatter_tensor(x.contiguous(), "sum", size, group)


def wait(pending: Tensor, waits: Waits = UNTIMED) -> Tensor:
    """The result of a collective that was started: it may be used from here on."""
    with waits:
        return torch.ops._c10d_functional.wait_tensor(pending)


def all_reduce(x: Tensor, reduction: str, group: str, waits: Waits = UNTIMED) -> Tensor:
    """x reduced ("sum" or "max") over the ranks of `group`; same shape and dtype."""
    return wait(torch.ops._c10d_functional.all_reduce(x.contiguous(), reduction, group), waits)


def all_gather(x: Tensor, size: int, group: str, waits: Waits = UNTIMED) -> Tensor:
    """[...] on each of the `size` ranks of `group` -> [size, ...] in rank order."""
    return wait(start_all_gather(x.unsqueeze(0), size, group), waits)


def all_to_all(x: Tensor, received: list[int], sent: list[int], group: str) -> Tensor:
    """x [sum(sent)], of which the ranks of `group` get `sent` elements in turn -> what they send, [sum(received)]."""
    return wait(torch.ops._c10d_functional.all_to_all_single(x, received, sent, group))


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
    def forward(ctx: Any, x: Tensor, group: str, waits: Waits) -> Tensor:
        ctx.group, ctx.waits = group, waits
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return all_reduce(grad, "sum", ctx.group, ctx.waits), None, None


class ReduceFromTensorParallel(torch.autograd.Function):
    """g: all-reduce forward, identity backward, for an activation of which each rank holds a partial sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str, waits: Waits) -> Tensor:
        return all_reduce(x, "sum", group, waits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


class GatherSequence(torch.autograd.Function):
    """All-gather along the sequence forward, reduce-scatter backward: f for activations that are split by T."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, group: str, waits: Waits) -> Tensor:
        ctx.size, ctx.group, ctx.waits = size, group, waits
        return batch_first(wait(start_all_gather(x, size, group), waits), size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        pending = start_reduce_scatter(sequence_first(grad, ctx.size), ctx.size, ctx.group)
        return wait(pending, ctx.waits), None, None, None


class ScatterSequence(torch.autograd.Function):
    """Reduce-scatter along the sequence forward, all-gather backward: g for activations that are split by T."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, group: str, waits: Waits) -> Tensor:
        ctx.size, ctx.group, ctx.waits = size, group, waits
        return wait(start_reduce_scatter(sequence_first(x, size), size, group), waits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        pending = start_all_gather(grad, ctx.size, ctx.group)
        return batch_first(wait(pending, ctx.waits), ctx.size), None, None, None


def f(x: Tensor, group: str, waits: Waits = UNTIMED) -> Tensor:
    """x; its gradient is summed over the ranks of `group`."""
    return CopyToTensorParallel.apply(x, group, waits)  # pyright: ignore[reportReturnType]


def g(x: Tensor, group: str, waits: Waits = UNTIMED) -> Tensor:
    """The sum of x over the ranks of `group`."""
    return ReduceFromTensorParallel.apply(x, group, waits)  # pyright: ignore[reportReturnType]


def gather_sequence(x: Tensor, size: int, group: str, waits: Waits = UNTIMED) -> Tensor:
    """[B, T / size, C] on each of the `size` ranks of `group` -> [B, T, C]."""
    return GatherSequence.apply(x, size, group, waits)  # pyright: ignore[reportReturnType]


def scatter_sequence(x: Tensor, size: int, group: str, waits: Waits = UNTIMED) -> Tensor:
    """The sum of x [B, T, C] over the `size` ranks of `group`, of which each keeps its [B, T / size, C]."""
    return ScatterSequence.apply(x, size, group, waits)  # pyright: ignore[reportReturnType]
