"""The same operations in plain PyTorch, fp32 inside (float64 stays float64): the oracle.

B batch, T time (Tq queries, Tk keys), H query heads, K key/value heads, R = H / K, D head width, C
model width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.philox import DropoutKey, keep_mask


def wide(x: Tensor) -> Tensor:
    """x in at least float32."""
    return x if x.dtype == torch.float64 else x.float()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dropout: DropoutKey | None = None,
    samples: Tensor | None = None,
    head_offset: int = 0,
) -> Tensor:
    """dropout(softmax(q k^T / sqrt(D) + causal mask)) v; see kernels.attention.attention."""
    B, Tq, H, D = q.shape
    Tk, K = k.shape[1], k.shape[2]
    queries = wide(q).reshape(B, Tq, K, H // K, D)
    scores = torch.einsum("btkrd,bskd->bkrts", queries, wide(k)) / math.sqrt(D)
    rows = torch.arange(Tk - Tq, Tk, device=q.device)
    cols = torch.arange(Tk, device=q.device)
    weights = scores.masked_fill(cols > rows[:, None], -math.inf).softmax(dim=-1)
    if dropout is not None and dropout.p > 0:
        assert samples is not None
        heads = torch.arange(head_offset, head_offset + H, device=q.device)
        keep = keep_mask(dropout, samples, rows, Tk, heads).view(weights.shape)
        weights = torch.where(keep, weights, 0.0) * (1 / (1 - dropout.p))
    out = torch.einsum("bkrts,bskd->btkrd", weights, wide(v))
    return out.reshape(B, Tq, H, D).to(q.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension."""
    rows = wide(x)  # once: each cast would round its own part of the gradient
    centred = rows - rows.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * wide(weight)
    return (y if bias is None else y + wide(bias)).to(x.dtype)
