"""GELU: reads one tensor and writes one; the backward reads two and writes one."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.kernels.case import BenchCase, Setup, Thunk
from benchmarks.kernels.swiglu import timed
from kernels.gelu import gelu

# Rows and width: the GPT presets of 124M, 350M, 1.3B and 6.7B.
SHAPES = [(16384, 3072), (16384, 4096), (16384, 8192), (8192, 16384)]
SMALL = [(32, 48)]


def cases(device: torch.device, small: bool) -> Iterator[BenchCase]:
    dtype = torch.float32 if small else torch.bfloat16
    for N, F in SMALL if small else SHAPES:
        for part, passes in (("forward", 2), ("backward", 3)):
            x, dy = (torch.randn(N, F, device=device, dtype=dtype) for _ in range(2))
            moved = passes * x.numel() * dtype.itemsize
            yield BenchCase(
                "gelu", part, f"N={N} F={F}", "width", F, str(dtype)[6:], 0.0, moved, _rivals(x, dy, part)
            )  # fmt: skip


def _rivals(x: Tensor, dy: Tensor, part: str) -> dict[str, Setup]:
    def form(impl: str) -> Callable[..., Tensor]:
        return lambda x: gelu(x, impl=impl)

    def flash_attn() -> Thunk:
        return timed(importlib.import_module("flash_attn.ops.activations").fast_gelu_impl, part, [x], [dy])

    ours = form("triton" if dy.is_cuda else "torch")
    return {
        "ingot": lambda: timed(ours, part, [x], [dy]),
        "reference": lambda: timed(form("reference"), part, [x], [dy]),
        "torch": lambda: timed(form("torch"), part, [x], [dy]),
        "torch.compile": lambda: timed(torch.compile(form("torch")), part, [x], [dy]),
        "flash_attn": flash_attn,
    }
