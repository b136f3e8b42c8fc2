"""LoRA in Megatron's parallel layers: B is cut by rows as a column-parallel weight is, A by columns as a row-parallel.

So B A has the cut of W, and a checkpoint merges under any layout. The other factor is whole on every rank. What ranks
exchange beyond the layers themselves is r wide: in a column-parallel layer x A^T takes the way of x, and in a
row-parallel one the partial sums are added before they are reduced.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.config.lora import LoRAConfig
from llm.model.layers import LinearRole
from llm.parallel.collectives import f
from llm.parallel.layers import (
    ColumnLinear,
    ColumnParallelLinear,
    RowParallelLinear,
    TensorParallel,
    TensorParallelLayers,
    split,
)
from llm.slices import Slice, mark


def whole(rows: int, columns: int) -> nn.Parameter:
    """A factor that every rank holds."""
    parameter = nn.Parameter(torch.zeros(rows, columns))
    mark(parameter, Slice.full((rows, columns)))
    return parameter


class ColumnParallelLoRA(ColumnParallelLinear):
    """y_tp = x W_tp^T + b_tp + s (x A^T) B_tp^T."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, tp: TensorParallel, lora: LoRAConfig
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, tp=tp)
        self.lora_a = whole(lora.rank, in_features)
        self.lora_b = split(torch.zeros(out_features // tp.size, lora.rank), tp.slice((out_features, lora.rank), 0))
        self.scale = lora.scale

    def forward(self, x: Tensor) -> Tensor:
        low: Any = ColumnLinear.apply(F.linear(x, self.tp.on_weight(self.lora_a)), self.lora_b, None, self.tp)
        return super().forward(x) + self.scale * low


class RowParallelLoRA(RowParallelLinear):
    """y = (sum over ranks of x_tp W_tp^T + s (x_tp A_tp^T) B^T) + b."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, tp: TensorParallel, lora: LoRAConfig
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, tp=tp)
        self.lora_a = split(torch.zeros(lora.rank, in_features // tp.size), tp.slice((lora.rank, in_features), 1))
        self.lora_b = whole(out_features, lora.rank)
        self.scale = lora.scale

    def partial(self, x_tp: Tensor) -> Tensor:
        # Each rank's gradient of B is of its own part of x: f sums it.
        low = F.linear(F.linear(x_tp, self.lora_a), f(self.lora_b, self.tp.name, self.tp.waits))
        return super().partial(x_tp) + self.scale * low


class TensorParallelLoRALayers(TensorParallelLayers):
    """The tensor-parallel factory with factors in the linears that `lora` names."""

    def __init__(self, lora: LoRAConfig, tp: TensorParallel, **options: Any) -> None:
        super().__init__(tp, **options)
        self.lora = lora

    def linear(self, role: LinearRole, in_features: int, out_features: int, *, bias: bool) -> nn.Module:
        if role not in self.lora.targets:
            return super().linear(role, in_features, out_features, bias=bias)
        layer = ColumnParallelLoRA if role in ("qkv", "up") else RowParallelLoRA
        return layer(in_features, out_features, bias=bias, tp=self.tp, lora=self.lora)
