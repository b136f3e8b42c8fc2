"""Causal attention in plain PyTorch.

B batch, Tq queries, Tk keys, H query heads, K key/value heads, R = H / K, D head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.philox import DropoutKey, keep_mask
from kernels.reference.wide import wide


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
