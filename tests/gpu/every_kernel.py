"""Runs every kernel once, forward and backward, on small odd shapes: what test_gpu_sanitizer.py watches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.kernels import activations, adamw, attention, cross_entropy, dropout, embedding, norm, rope
from benchmarks.kernels.attention import Shape
from benchmarks.kernels.case import DTYPES, Case
from kernels.attention import Strided
from kernels.attention import attention as attend
from kernels.philox import DropoutKey

KEY = DropoutKey(0.2, 2**32 - 5, 7)


def of_attention(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    features = [
        {}, {"window": 9}, {"sparse": Strided(64, 1, 2)}, {"documents": 5}, {"softcap": 5.0}, {"dropout": KEY},
        {"atomics": True}, {"lse": True},
    ]  # fmt: skip
    for D in (40, 64, 128, 256):
        for feature in features:
            yield attention.case(device, dtype, replace(Shape(2, 67, 4, D, K=2), **feature))
        _, k, v = attention.case(device, dtype, Shape(2, 67, 4, D, K=2)).tensors
        q = torch.randn(2, 5, 4, D, device=device).to(dtype)
        yield Case("decoding", attend, (q, k, v), (torch.randn_like(q),))


def of_hopper(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Attention in Gluon, where it runs: fewer tiles than stages, and more."""
    for D in (64, 128):
        for T, options in ((67, {}), (700, {"window": 9}), (700, {"documents": 5}), (700, {"lse": True})):
            shape = Shape(2, T, 4, D, K=2, gluon=True, **options)
            if attention.on_hopper(shape, device) and dtype != torch.float32:
                yield attention.case(device, dtype, shape)


def of_rows(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Norms, dropout, activations, rotation."""
    for C in (40, 770, 10_000):
        for op in norm.OPS:
            key = KEY if op.startswith("add") else None
            yield norm.case(device, dtype, op, 2, 33, C, dropout=key, weights=torch.float32)
        yield dropout.case(device, dtype, 2, 33, C)
        for function in (activations.gelu, activations.swiglu):
            yield activations.case(device, dtype, function, 66, C)
            yield activations.case(device, dtype, function, 66, C, strided=True)
    yield rope.case(device, dtype, 2, 33, 2, 3, 40)


def of_vocabulary(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Embedding, cross-entropy, AdamW."""
    V, C = 5003, 40
    tokens = embedding.tokens_of(201, V).to(device)
    tokens[:67] = 1
    yield embedding.case(dtype, tokens, C, V)
    yield cross_entropy.layer_case(dtype, tokens, C, V, z_loss=1e-4, chunk=64)
    for inplace in (False, True):
        yield cross_entropy.case(dtype, tokens[67:134], V, softcap=30.0, inplace=inplace)
    yield adamw.case(device, torch.float32, 10_007, low=torch.bfloat16, seed=3)


def main(device: torch.device) -> None:
    for dtype in DTYPES.values():
        for cases in (of_attention, of_hopper, of_rows, of_vocabulary):
            for case in cases(device, dtype):
                case.results(case.impl)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main(torch.device("cuda"))
