"""A model of the Triton kernels' operators on the meta device: its shapes are real, its numbers are not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import kernels.cross_entropy.linear
import kernels.dispatch
from llm.config import RunConfig
from llm.model.gpt import GPT
from llm.train.build import build_model
from llm.train.engines.base import DTYPES

CHUNK = 256  # tokens whose logits exist at once


def products(multiple: int) -> Any:
    """FLOPs of so many non-causal products of all queries and keys, from the shape of an operator's first tensor."""

    def count(*shapes: Any, **options: Any) -> int:
        B, T, H, *_, D = shapes[0]  # [B, T, H, D], or [B, T, H, 3, D]
        return multiple * 2 * B * H * T * T * D

    return count


# The backward pass has four products; that the kernels compute the scores again is no part of the model's FLOPs.
ATTENTION = {torch.ops.ingot.attention: products(2), torch.ops.ingot.attention_backward: products(4)}


def meta_model(config: RunConfig, patch: pytest.MonkeyPatch) -> GPT:
    """The model of a config, in train.precision."""
    patch.setattr(kernels.dispatch, "why_not_triton", lambda device, dtype: None)
    patch.setattr(kernels.cross_entropy.linear, "chunk_tokens", lambda device, size: CHUNK)
    config = replace(config, train=replace(config.train, impl="triton"))
    with torch.device("meta"):
        return cast(GPT, build_model(config, None)).to(DTYPES[config.train.precision])


def forward(model: GPT, B: int, T: int) -> Tensor:
    """The loss of B rows of T tokens."""
    tokens = torch.zeros(B, T, dtype=torch.int64, device="meta")
    positions = torch.arange(T, device="meta")
    return model(tokens, positions, torch.arange(B, device="meta"), tokens)


def flops_of_step(model: GPT, B: int, T: int) -> int:
    """Of the matrix products and the attention of a forward and a backward pass."""
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counted:
        forward(model, B, T).backward()
    return counted.get_total_flops()


def saved_bytes(model: GPT, B: int, T: int) -> int:
    """Of the storages that a forward pass keeps for the backward pass, weights apart."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward(model, B, T)
    return sum(found.nbytes() for key, found in kept.items() if key not in weights)
