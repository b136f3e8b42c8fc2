"""Communication between ranks, as functions: operators that torch.compile can trace, and Megatron's f and g.

The operators name a process group by its string, so that they are pure functions of tensors and constants.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group

REDUCTIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


@torch.library.custom_op("ingot::all_reduce", mutates_args=())
def all_reduce(x: Tensor, reduction: str, group: str) -> Tensor:
    """x reduced ("sum" or "max") over the ranks of `group`; same shape and dtype."""
    y = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(y, REDUCTIONS[reduction], group=_resolve_process_group(GroupName(group)))
    return y


@all_reduce.register_fake
def _(x: Tensor, reduction: str, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("ingot::all_gather", mutates_args=())
def all_gather(x: Tensor, size: int, group: str) -> Tensor:
    """[...] on each of the `size` ranks of `group` -> [size, ...] in rank order."""
    y = x.new_empty((size, *x.shape))
    dist.all_gather(list(y.unbind(0)), x.contiguous(), group=_resolve_process_group(GroupName(group)))
    return y


@all_gather.register_fake
def _(x: Tensor, size: int, group: str) -> Tensor:
    return x.new_empty((size, *x.shape))


class CopyToTensorParallel(torch.autograd.Function):
    """Megatron's f (Shoeybi et al. 2019, section 3): identity forward, all-reduce backward.

    It stands where a replicated activation enters a layer whose ranks each use it for a part of the output.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad, "sum", ctx.group), None


class ReduceFromTensorParallel(torch.autograd.Function):
    """Megatron's g: all-reduce forward, identity backward.

    It stands where each rank holds a partial sum of a replicated activation.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        return all_reduce(x, "sum", group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def f(x: Tensor, group: str) -> Tensor:
    return CopyToTensorParallel.apply(x, group)  # pyright: ignore[reportReturnType]


def g(x: Tensor, group: str) -> Tensor:
    return ReduceFromTensorParallel.apply(x, group)  # pyright: ignore[reportReturnType]
