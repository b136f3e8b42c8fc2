"""Runs every kernel once, forward and backward, on small odd shapes: what test_gpu_sanitizer.py watches."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.adamw import adamw_
from kernels.attention import Strided, attention
from kernels.cross_entropy import cross_entropy
from kernels.cross_entropy.linear import linear_cross_entropy
from kernels.dropout import dropout
from kernels.embedding import embedding
from kernels.gelu import gelu
from kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from kernels.philox import DropoutKey
from kernels.rope import rope_qkv
from kernels.swiglu import swiglu

KEY = DropoutKey(0.2, 2**32 - 5, 7)


def differentiate(*outputs: Tensor) -> None:
    sum(o.float().square().sum() for o in outputs if o.requires_grad).backward()


def leaf(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)


def run_attention(device: torch.device, dtype: torch.dtype) -> None:
    samples = torch.arange(2, device=device)
    documents = torch.tensor([0, 0, 1, 60, 67, 134], dtype=torch.int32, device=device)
    features = [
        {}, {"window": 9}, {"sparse": Strided(64, 1, 2)}, {"cu_seqlens": documents}, {"softcap": 5.0},
        {"dropout": KEY, "samples": samples}, {"deterministic": False},
    ]  # fmt: skip
    for D in (40, 64, 128, 256):
        for feature in features:
            q = leaf(2, 67, 4, D, device=device, dtype=dtype)
            k, v = (leaf(2, 67, 2, D, device=device, dtype=dtype) for _ in range(2))
            differentiate(attention(q, k, v, impl="triton", **feature))
        differentiate(attention(leaf(2, 5, 4, D, device=device, dtype=dtype), k, v, impl="triton"))


def run_rows(device: torch.device, dtype: torch.dtype) -> None:
    """Norms, dropout, activations, rotation."""
    samples, positions = torch.arange(2, device=device), torch.arange(33, device=device)
    keyed = {"dropout": KEY, "samples": samples, "positions": positions}
    for C in (40, 770, 10_000):
        x, residual = (leaf(2, 33, C, device=device, dtype=dtype) for _ in range(2))
        weight, bias = (leaf(C, device=device, dtype=torch.float32) for _ in range(2))
        differentiate(layer_norm(x, weight, bias, impl="triton"), rms_norm(x, weight, impl="triton"))
        differentiate(*add_layer_norm(x, residual, weight, bias, impl="triton", **keyed))
        differentiate(*add_rms_norm(x, residual, weight, impl="triton", **keyed))
        differentiate(dropout(x, KEY, samples, positions, residual=residual, impl="triton"))
        differentiate(swiglu(x, impl="triton"), gelu(x, impl="triton"))
    qkv = leaf(2, 33, 2 * 5 * 40, device=device, dtype=dtype)
    differentiate(*rope_qkv(qkv, positions, n_kv_head=2, head_dim=40, impl="triton"))


def run_vocabulary(device: torch.device, dtype: torch.dtype) -> None:
    """Embedding, cross-entropy, AdamW."""
    V, C = 5003, 40
    weight = leaf(V, C, device=device, dtype=dtype)
    tokens = torch.randint(0, V, (3, 67), device=device)
    tokens[0] = 1
    x = embedding(tokens, weight, impl="triton")
    linear_cross_entropy(x, weight, tokens, z_loss=1e-4, chunk=64, impl="triton").backward()
    for inplace in (False, True):
        logits = leaf(67, V, device=device, dtype=dtype)
        cross_entropy(logits * 1, tokens[1], softcap=30.0, inplace=inplace, impl="triton")[0].sum().backward()
    flat = [torch.rand(10_007, device=device) for _ in range(4)]
    copy = torch.empty(10_007, device=device, dtype=torch.bfloat16)
    adamw_(
        *flat, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, step=1, low_precision=copy, seed=3,
        impl="triton",
    )  # fmt: skip


def main(device: torch.device) -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for part in (run_attention, run_rows, run_vocabulary):
            part(device, dtype)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main(torch.device("cuda"))
