"""The cases of the embedding and its gradient, for tokens that are as frequent as in a text (Zipf)."""

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.case import Case, Contest, Function, loaders, normal, setups, timed_dtype
from kernels.embedding import embedding

# (B, T, C, V): the GPT presets, a long batch, Llama's vocabulary.
SHAPES = [
    (16, 1024, 768, 50304), (16, 1024, 1024, 50304), (8, 2048, 2048, 50304), (4, 2048, 4096, 50304),
    (64, 2048, 768, 50304), (8, 2048, 4096, 128256),
]  # fmt: skip
SMALL = [(2, 64, 32, 100)]
WIDTHS = (128, 768, 1600, 4096)  # whose kernels are compiled


def tokens_of(N: int, V: int) -> Tensor:
    """int64 [N]: of the n-th most frequent word a text has a share of about 1 / n."""
    torch.manual_seed(0)
    ranks = torch.multinomial(1.0 / torch.arange(1, V + 1), N, replacement=True)
    return torch.randperm(V)[ranks]


def case(dtype: torch.dtype, tokens: Tensor, C: int, V: int, **options: bool) -> Case:
    """Of a table [V, C] on the device of the tokens [...]; `options` of embedding."""
    weight, dy = normal(tokens.device, dtype, (V, C), (*tokens.shape, C))

    def function(weight: Tensor, impl: str) -> Tensor:
        return embedding(tokens, weight, impl=impl, **options)

    return Case(f"N={tokens.numel()} C={C} V={V}", function, (weight,), (dy,))


def compiled(dtype: torch.dtype) -> Iterator[Case]:
    for C in WIDTHS:
        yield case(dtype, tokens_of(130, 24), C, 24)


def contests(device: torch.device, small: bool) -> Iterator[Contest]:
    for B, T, C, V in SMALL if small else SHAPES:
        N = B * T
        tokens = tokens_of(N, V).view(B, T).to(device)
        given = case(timed_dtype(small), tokens, C, V)
        weight = given.tensors[0]
        rows = int(tokens.unique().numel())
        found = loaders(given) | {"Liger": lambda tokens=tokens: liger(tokens)}
        for part, moved in (("forward", rows + N), ("backward", N + V)):
            yield Contest(
                "embedding", part, f"B={B} T={T} C={C} V={V}", "tokens", N, weight.dtype,
                N * 8 + moved * C * weight.itemsize, setups(given, part, found),
            )  # fmt: skip


def liger(tokens: Tensor) -> Function:
    """Adds with atomics, in an order that differs from run to run."""
    function: Any = import_module("liger_kernel.ops.experimental.embedding").LigerEmbeddingFunction
    return lambda weight: function.apply(weight, tokens)
