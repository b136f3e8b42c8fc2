"""Table look-up and its gradient, for tokens as frequent as a text's (Zipf) and for a rank's half of a vocabulary."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.case import BenchCase, Setup, Thunk
from kernels.embedding import embedding

# (B, T, C, V): the GPT presets, a long batch, Llama's vocabulary.
SHAPES = [
    (16, 1024, 768, 50304), (16, 1024, 1024, 50304), (8, 2048, 2048, 50304), (4, 2048, 4096, 50304),
    (64, 2048, 768, 50304), (8, 2048, 4096, 128256),
]  # fmt: skip
SMALL = [(2, 64, 32, 100)]


def cases(device: torch.device, small: bool) -> Iterator[BenchCase]:
    dtype = torch.float32 if small else torch.bfloat16
    for B, T, C, V in SMALL if small else SHAPES:
        torch.manual_seed(0)
        N = B * T
        # Of the n-th most frequent word a text has a share of about 1 / n.
        frequency = 1.0 / torch.arange(1, V + 1)
        tokens = torch.multinomial(frequency, N, replacement=True)[torch.randperm(N)]
        tokens = torch.randperm(V)[tokens].view(B, T).to(device)
        weight = torch.randn(V, C, device=device, dtype=dtype)
        dy = torch.randn(B, T, C, device=device, dtype=dtype)
        rows = int(tokens.unique().numel())
        moved = {"forward": N * 8 + (rows + N) * C * dtype.itemsize, "backward": N * 8 + (N + V) * C * dtype.itemsize}
        for part, least in moved.items():
            rivals = rivals_of(part, tokens, weight, dy)
            name = f"B={B} T={T} C={C} V={V}"
            yield BenchCase("embedding", part, name, "tokens", N, str(dtype)[6:], float(N * C), least, rivals)


def rivals_of(part: str, tokens: Tensor, weight: Tensor, dy: Tensor) -> dict[str, Setup]:
    impl = "triton" if weight.device.type == "cuda" else "torch"
    functions = {
        "ingot": lambda: lambda w: embedding(tokens, w, impl=impl),
        "reference": lambda: lambda w: embedding(tokens, w, impl="reference"),
        "torch": lambda: lambda w: F.embedding(tokens, w),
        "torch.compile": lambda: torch.compile(lambda w: F.embedding(tokens, w)),
        "Liger": lambda: liger(tokens),
    }

    def setup(make) -> Setup:
        def timed() -> Thunk:
            function = make()
            if part == "forward":
                return torch.no_grad()(lambda: function(weight))
            table = weight.detach().requires_grad_()
            y = function(table)
            return lambda: torch.autograd.grad(y, table, dy, retain_graph=True)

        return timed

    return {name: setup(make) for name, make in functions.items()}


def liger(tokens: Tensor):
    """Adds with atomics, in an order that differs from run to run."""
    function = importlib.import_module("liger_kernel.ops.experimental.embedding").LigerEmbeddingFunction
    return lambda w: function.apply(w, tokens)
