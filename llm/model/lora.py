"""Low-rank adaptation (LoRA, Hu et al. 2022): y = x W^T + b + s (x A^T) B^T, where A and B alone are trained.

A is normal with the variance 1 / I and B zero at first, so that training begins with the model as it was. A linear
keeps the names of its weight and bias, and A and B lie beside them: `blocks.0.qkv.lora_a`, `blocks.0.qkv.lora_b`.

Shapes: I input width, O output width, r rank: W [O, I], A [r, I], B [O, r].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.config.lora import LoRAConfig, is_factor
from llm.model.layers import DenseLayers, Linear, LinearRole, replicated


class LoRALinear(Linear):
    """A linear with its two factors: [..., I] -> [..., O]."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, lora: LoRAConfig) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.lora_a = nn.Parameter(torch.zeros(lora.rank, in_features))
        self.lora_b = nn.Parameter(torch.zeros(out_features, lora.rank))
        self.scale = lora.scale

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        low = F.linear(F.linear(x, self.lora_a), self.lora_b)
        # Last, for a block that is computed again does without its last product (llm/plan/flops.py).
        return super().forward(x) + self.scale * low


class LoRALayers(DenseLayers):
    """The dense factory with factors in the linears that `lora` names; the options are DenseLayers'."""

    def __init__(self, lora: LoRAConfig, **options: Any) -> None:
        super().__init__(**options)
        self.lora = lora

    def linear(self, role: LinearRole, in_features: int, out_features: int, *, bias: bool) -> nn.Module:
        if role not in self.lora.targets:
            return super().linear(role, in_features, out_features, bias=bias)
        return replicated(LoRALinear(in_features, out_features, bias=bias, lora=self.lora))


def freeze(model: nn.Module) -> None:
    """Let training change the factors alone."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_factor(name))
