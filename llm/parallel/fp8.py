"""The linears of a block in FP8, on one rank and under tensor and sequence parallelism (llm/parallel/layers.py).

A linear y = x W^T has three products. With scales for rows, each operand has one for what is multiplied together:

    forward              y  = x W^T       along I      x, W in e4m3
    input's gradient     dx = dy W        along O      dy in e5m2, W in e4m3
    weight's gradient    dW = dy^T x      along T      dy in e5m2, x in e4m3; or both as they are

A scale is that of the whole tensor under every layout: ranks that hold parts of what shares a scale join their maxima.
These are all parts where a tensor has one scale, and with scales for rows those that are cut along the product:

                  x     W     dy      joined with scales for rows
    column        T*    O     O       dy and W for dx, x* for dW
    row           I     I     T*      x and W for y                    * with sequence parallelism; else whole

What is gathered along T is quantised before: a byte for an element, and the scales. Not so what the weight's gradient
takes as it is, or row by row of another direction: dy of a row-parallel linear then, and x again if as it is.

Shapes: B batch, T time (sequence), I input width, O output width; a weight is [O, I].
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from llm.model.fp8 import E4M3, E5M2, Quantised, largest, product, quantise
from llm.model.layers import DenseLayers, LinearRole
from llm.parallel.collectives import (
    all_reduce,
    batch_first,
    sequence_first,
    start_all_gather,
    start_all_reduce_,
    start_reduce_scatter,
    wait,
)
from llm.parallel.layers import TensorParallel, TensorParallelLayers

Dim = Literal["T", "I", "O"]
LAST: dict[str, Dim] = {"x": "I", "weight": "I", "dy": "O"}


class FP8(NamedTuple):
    """How the operands of linears are quantised."""

    rowwise: bool
    """With a scale for each row, rather than one for a tensor."""
    high: bool
    """Those of the weight's gradient are not."""


@dataclass(frozen=True)
class Cut:
    """The dimension along which the ranks of `tp` share each operand of a linear; None: every rank has all of it."""

    tp: TensorParallel | None = None
    x: Dim | None = None
    weight: Dim | None = None
    dy: Dim | None = None

    @staticmethod
    def of(role: LinearRole, tp: TensorParallel) -> Cut:
        tokens = "T" if tp.sequence_parallel else None
        return Cut(tp, tokens, "O", "O") if role in ("qkv", "up") else Cut(tp, "I", "I", tokens)

    def largest(self, along: Dim, rowwise: bool, **parts: Tensor) -> list[Tensor]:
        """max |operand| over what shares a scale in a product along `along`; parts: what this rank has of each operand.

        One all-reduce joins all that are cut there.
        """
        found, cut = [], []
        for of, part in parts.items():
            rows, columns = (part.dim() - 1,), tuple(range(part.dim() - 1))
            found.append(largest(part, (rows if along == LAST[of] else columns) if rowwise else ()))
            if getattr(self, of) in ((along,) if rowwise else ("T", "I", "O")):
                cut.append(found[-1])
        if self.tp is not None and cut:
            joined = all_reduce(torch.cat([each.flatten() for each in cut]), "max", self.tp.name, self.tp.waits)
            for each, whole in zip(cut, joined.split([each.numel() for each in cut]), strict=True):
                each.copy_(whole.view_as(each))
        return found

    def start_gather(self, x: Tensor) -> Tensor:
        """Start to join x [B, T / tp, ...] along T; FP8 travels as bytes."""
        assert self.tp is not None
        return start_all_gather(x.view(torch.uint8) if x.itemsize == 1 else x, self.tp.size, self.tp.name)

    def gathered(self, pending: Tensor, dtype: torch.dtype) -> Tensor:
        """What `start_gather` was given, of `dtype`, whole: [B, T, ...]."""
        assert self.tp is not None
        return batch_first(wait(pending, self.tp.waits), self.tp.size).view(dtype)

    def gather(self, x: Quantised) -> Quantised:
        """All of what is cut along T: values [B, T, K]; scales of rows too."""
        values, rows = self.start_gather(x.values), x.scale.dim() > 0 and x.scale.shape[-1] == 1
        scale = self.gathered(self.start_gather(x.scale), x.scale.dtype) if rows else x.scale
        return Quantised(self.gathered(values, x.values.dtype), scale)

    def start_sum(self, partial: Tensor) -> Tensor:
        """Start to sum [B, T, K] over ranks, of which with sequence parallelism each keeps [B, T / tp, K]."""
        assert self.tp is not None
        if self.tp.sequence_parallel:
            return start_reduce_scatter(sequence_first(partial, self.tp.size), self.tp.size, self.tp.name)
        return start_all_reduce_(partial, self.tp.name)

    def summed(self, pending: Tensor) -> Tensor:
        assert self.tp is not None
        return wait(pending, self.tp.waits)


class FP8Product(torch.autograd.Function):
    """y = x W^T, with x, W and y cut as `cut` says, and its gradients.

    x may be kept quantised; the weight is not, which ZeRO 3 and FSDP release in the meantime and gather again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, how: FP8, cut: Cut) -> Tensor:
        ctx.how, ctx.cut = how, cut
        largest_x, largest_weight = cut.largest("I", how.rowwise, x=x, weight=weight)
        x8 = quantise(x, E4M3, largest_x)
        kept = (x,) if how.high or how.rowwise else x8
        ctx.save_for_backward(weight, largest_weight, *kept)
        if cut.x == "T":
            x8 = cut.gather(x8)
        y = product(x8.rows(), quantise(weight, E4M3, largest_weight).rows(), x.dtype)
        y = y.unflatten(0, x8.values.shape[:-1])
        return cut.summed(cut.start_sum(y)) if cut.weight == "I" else y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        weight, largest_weight, *kept = ctx.saved_tensors
        how, cut, (needs_x, needs_weight, *_) = ctx.how, ctx.cut, ctx.needs_input_grad
        if how.rowwise and not how.high and needs_weight:
            kept = quantise(kept[0], E4M3, *cut.largest("T", True, x=kept[0]))
        pending = cut.start_gather(kept[0]) if cut.x == "T" and needs_weight else None
        if cut.dy == "T" and needs_weight and (how.rowwise or how.high):
            grad, cut = cut.gathered(cut.start_gather(grad), grad.dtype), replace(cut, dy=None)
        largest_dy, *anew = cut.largest("O", how.rowwise, dy=grad, **({"weight": weight} if how.rowwise else {}))
        dy = quantise(grad, E5M2, largest_dy)
        if cut.dy == "T":
            dy = cut.gather(dy)
        grad_x = grad_weight = None
        if needs_x:
            grad_x = product(dy.rows(), quantise(weight, E4M3, *anew or (largest_weight,)).columns(), grad.dtype)
            grad_x = grad_x.unflatten(0, dy.values.shape[:-1])
            grad_x = cut.start_sum(grad_x) if cut.weight == "O" else grad_x
        if needs_weight:
            x = kept[0] if pending is None else cut.gathered(pending, kept[0].dtype)
            if how.high:
                grad_weight = grad.flatten(0, -2).t() @ x.flatten(0, -2)
            else:
                dy = quantise(grad, E5M2, *cut.largest("T", True, dy=grad)) if how.rowwise else dy
                grad_weight = product(dy.columns(), Quantised(x, kept[1]).columns(), grad.dtype)
        grad_x = cut.summed(grad_x) if grad_x is not None and cut.weight == "O" else grad_x
        return grad_x, grad_weight, None, None


class FP8Linear(nn.Module):
    """A linear of another factory with its products in FP8, and the same parameters."""

    def __init__(self, linear: Any, how: FP8, cut: Cut) -> None:
        super().__init__()
        self.weight: nn.Parameter = linear.weight
        self.bias: nn.Parameter | None = linear.bias
        self.how, self.cut = how, cut

    def forward(self, x: Tensor) -> Tensor:
        y: Any = FP8Product.apply(x, self.weight, self.how, self.cut)
        if self.bias is None:
            return y
        return y + (self.cut.tp.on_weight(self.bias) if self.cut.tp and self.cut.weight == "I" else self.bias)


class FP8Layers(DenseLayers):
    """The dense factory with the linears in FP8; the options are DenseLayers'."""

    def __init__(self, how: FP8, **options: Any) -> None:
        super().__init__(**options)
        self.how = how

    def linear(self, role: LinearRole, in_features: int, out_features: int, *, bias: bool) -> nn.Module:
        return FP8Linear(super().linear(role, in_features, out_features, bias=bias), self.how, Cut())


class TensorParallelFP8Layers(TensorParallelLayers):
    """The tensor-parallel factory with the linears in FP8."""

    def __init__(self, how: FP8, tp: TensorParallel, **options: Any) -> None:
        super().__init__(tp, **options)
        self.how = how

    def linear(self, role: LinearRole, in_features: int, out_features: int, *, bias: bool) -> nn.Module:
        linear = super().linear(role, in_features, out_features, bias=bias)
        return FP8Linear(linear, self.how, Cut.of(role, self.tp))
