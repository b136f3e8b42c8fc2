"""SwiGLU's product: reads gate and up, writes one tensor; the backward reads three and writes two."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.case import BenchCase, Setup, Thunk
from kernels.swiglu import swiglu

# Rows and width of the result: GPT presets of 124M, 1.3B and 6.7B, LLaMA 7B, and Liger's widest.
SHAPES = [(16384, 3072), (16384, 8192), (8192, 16384), (8192, 11008), (8192, 32768)]
SMALL = [(32, 48)]


def timed(function: Callable[..., Any], part: str, tensors: Sequence[Tensor], gradients: Sequence[Tensor]) -> Thunk:
    """What is timed of `function` of `tensors`: its forward without a graph, or its backward alone."""
    if part == "forward":
        return lambda: function(*tensors)
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    return lambda: torch.autograd.grad(y, leaves, gradients, retain_graph=True)


def cases(device: torch.device, small: bool) -> Iterator[BenchCase]:
    dtype = torch.float32 if small else torch.bfloat16
    for N, F in SMALL if small else SHAPES:
        for part, passes in (("forward", 3), ("backward", 5)):
            x, dy = (torch.randn(N, width, device=device, dtype=dtype) for width in (2 * F, F))
            moved = passes * dy.numel() * dtype.itemsize
            yield BenchCase(
                "swiglu", part, f"N={N} F={F}", "width", F, str(dtype)[6:], 0.0, moved, _rivals(x, dy, part),
                # Its gradients are of two tensors; Liger writes them over gate and up.
                unlike=frozenset({"Liger", "flash_attn"} if part == "backward" else ()),
            )  # fmt: skip


def _rivals(x: Tensor, dy: Tensor, part: str) -> dict[str, Setup]:
    def form(impl: str) -> Callable[[Tensor], Tensor]:
        return lambda x: swiglu(x, impl=impl)

    def of_two(function: Callable[[Tensor, Tensor], Tensor]) -> Thunk:
        """A rival that takes gate and up as two contiguous tensors."""
        return timed(function, part, [x[:, i::2].clone(memory_format=torch.contiguous_format) for i in (0, 1)], [dy])

    def liger() -> Thunk:
        return of_two(importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction.apply)

    def flash_attn() -> Thunk:
        return of_two(importlib.import_module("flash_attn.ops.activations").swiglu)

    ours = form("triton" if x.is_cuda else "torch")
    return {
        "ingot": lambda: timed(ours, part, [x], [dy]),
        "reference": lambda: timed(form("reference"), part, [x], [dy]),
        "torch": lambda: timed(form("torch"), part, [x], [dy]),
        "torch.compile": lambda: timed(torch.compile(form("torch")), part, [x], [dy]),
        "Liger": liger,
        "flash_attn": flash_attn,
    }
