"""AdamW and what it decays."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llm.config import OptimConfig


def decays(name: str) -> bool:
    """Whether weight decay applies to the parameter of this name: matrices, not norms and biases.

    Decided by name, because under ZeRO 3 every parameter looks one-dimensional: the weights of
    linears, embeddings and the head decay; `bias` and what belongs to a `norm` does not.
    """
    *owners, kind = name.split(".")
    return kind == "weight" and not (owners and owners[-1].startswith("norm"))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters of `model` as groups for `adamw`: those that decay, then the others.

    The order within a group is that of `named_parameters`; a shared parameter comes once; a group
    without parameters is left out.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if decays(name)], "weight_decay": weight_decay},
        {"params": [p for name, p in named if not decays(name)], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) over `parameter_groups`.

    The fused implementation makes one pass over parameters, gradients and moments.
    """
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
