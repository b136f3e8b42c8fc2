"""Causal attention in plain PyTorch.

B batch, Tq queries, Tk keys, H query heads, K key/value heads, R = H / K, D head width.
"""

import math

import torch
from torch import Tensor

from kernels.attention.options import Strided
from kernels.dispatch import wide
from kernels.philox import DropoutKey, keep_mask


def visible(
    B: int, Tq: int, Tk: int, window: int | None, sparse: Strided | None, cu_seqlens: Tensor | None,
    device: torch.device,
) -> Tensor:  # fmt: skip
    """True where a query sees a key: bool [1, Tq, Tk], or [B, Tq, Tk] with documents."""
    rows = torch.arange(Tk - Tq, Tk, device=device)[:, None]
    cols = torch.arange(Tk, device=device)
    seen = (cols <= rows)[None]
    if window is not None:
        seen = seen & (cols > rows - window)
    if sparse is not None:
        apart = rows // sparse.block - cols // sparse.block
        seen = seen & ((apart < sparse.local) | (apart % sparse.stride == 0))
    if cu_seqlens is not None:
        tokens = torch.arange(B * Tk, device=device, dtype=cu_seqlens.dtype)
        document = torch.searchsorted(cu_seqlens, tokens, right=True).view(B, Tk)
        seen = seen & (document[:, Tk - Tq :, None] == document[:, None, :])
    return seen


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, sparse: Strided | None = None,
    cu_seqlens: Tensor | None = None, softcap: float = 0.0, dropout: DropoutKey | None = None,
    samples: Tensor | None = None, head_offset: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dropout(softmax(cap(q k^T / sqrt(D)) + mask)) v, lse [B, H, Tq]); see kernels.attention.attention.

    lse: the natural logarithm of each query's sum of exp(score), in fp32 or fp64.
    """
    B, Tq, H, D = q.shape
    Tk, K = k.shape[1], k.shape[2]
    queries = wide(q).reshape(B, Tq, K, H // K, D)
    scores = torch.einsum("btkrd,bskd->bkrts", queries, wide(k)) / math.sqrt(D)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    seen = visible(B, Tq, Tk, window, sparse, cu_seqlens, q.device)
    scores = scores.masked_fill(~seen[:, None, None], -math.inf)
    weights = scores.softmax(dim=-1)
    if dropout is not None and dropout.p > 0:
        assert samples is not None
        rows = torch.arange(Tk - Tq, Tk, device=q.device)
        heads = torch.arange(head_offset, head_offset + H, device=q.device)
        keep = keep_mask(dropout, samples, rows, Tk, heads).view(weights.shape)
        weights = torch.where(keep, weights, 0.0) * (1 / (1 - dropout.p))
    out = torch.einsum("bkrts,bskd->btkrd", weights, wide(v))
    return out.reshape(B, Tq, H, D).to(q.dtype), scores.logsumexp(dim=-1).reshape(B, H, Tq)
