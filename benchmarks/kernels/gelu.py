"""GELU after a bias: reads one tensor and writes one; the backward reads two and writes one. A bias costs no pass."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.kernels.case import BenchCase, Setup, Thunk
from benchmarks.kernels.swiglu import timed
from kernels.gelu import bias_gelu

# Rows and width: the GPT presets of 124M, 350M, 1.3B and 6.7B.
SHAPES = [(16384, 3072), (16384, 4096), (16384, 8192), (8192, 16384)]
SMALL = [(32, 48)]


def cases(device: torch.device, small: bool) -> Iterator[BenchCase]:
    dtype = torch.float32 if small else torch.bfloat16
    for N, F in SMALL if small else SHAPES:
        for part, passes in (("forward", 2), ("backward", 3)):
            for group in ("bias", "no bias"):
                x, dy = (torch.randn(N, F, device=device, dtype=dtype) for _ in range(2))
                tensors = [x, torch.randn(F, device=device, dtype=dtype)] if group == "bias" else [x]
                moved = passes * x.numel() * dtype.itemsize
                yield BenchCase(
                    "bias_gelu", part, f"{group} N={N} F={F}", "width", F, str(dtype)[6:], 0.0, moved,
                    _rivals(tensors, dy, part), group,
                )  # fmt: skip


def _rivals(tensors: list[Tensor], dy: Tensor, part: str) -> dict[str, Setup]:
    def form(impl: str) -> Callable[..., Tensor]:
        return lambda x, bias=None: bias_gelu(x, bias, impl=impl)

    def flash_attn() -> Thunk:
        module = importlib.import_module("flash_attn.ops.activations")
        return timed(module.fast_gelu_impl if len(tensors) == 1 else module.bias_gelu_impl, part, tensors, [dy])

    def megatron() -> Thunk:
        """A bias it needs; the sum of its gradient is left to autograd."""
        function = importlib.import_module("megatron.core.fusions.fused_bias_gelu").bias_gelu_impl
        return timed(function, part, tensors, [dy])

    ours = form("triton" if dy.is_cuda else "torch")
    found: dict[str, Setup] = {
        "ingot": lambda: timed(ours, part, tensors, [dy]),
        "reference": lambda: timed(form("reference"), part, tensors, [dy]),
        "torch": lambda: timed(form("torch"), part, tensors, [dy]),
        "torch.compile": lambda: timed(torch.compile(form("torch")), part, tensors, [dy]),
        "flash_attn": flash_attn,
    }
    return found if len(tensors) == 1 else found | {"Megatron": megatron}
