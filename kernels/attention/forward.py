"""The forward pass: one program computes one tile of queries of one head.

Online softmax in base 2 (Milakov & Gimelshein 2018; Dao et al. 2022): scores are scaled by log2(e)
/ sqrt(D) in fp32, and lse = log2(sum of 2^score) is kept for the backward pass.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.tiles import Tile, load_rows, store_rows, tile_here, tile_width
from kernels.dispatch import cdiv, interpretable, launch
from kernels.philox import DropoutKey, keep_tile, signed

LOG2_E = math.log2(math.e)


@triton.jit
def attend(
    acc, high, total, q, positions, k_ptr, v_ptr, stride_kt, stride_vt, first, last, Tk, scale,
    seed, site, threshold, sample, head,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """Fold keys first to last - 1 into (weighted sum, running maximum, running total)."""
    for start in range(first, last, BLOCK_N):
        k = load_rows(k_ptr, stride_kt, start, Tk, D, BLOCK_N, WIDTH, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if MASKED:
            cols = start + tl.arange(0, BLOCK_N)
            scores = tl.where(cols[None, :] <= positions[:, None], scores, float("-inf"))
        higher = tl.maximum(high, tl.max(scores, 1))
        shrink = tl.exp2(high - higher)
        weights = tl.exp2(scores - higher[:, None])
        total = total * shrink + tl.sum(weights, 1)
        if DROPOUT:
            keep = keep_tile(seed, site, threshold, sample, head, positions, start, BLOCK_N)
            weights = tl.where(keep, weights, 0.0)
        v = load_rows(v_ptr, stride_vt, start, Tk, D, BLOCK_N, WIDTH, MASKED)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        high = higher
    return acc, high, total


@triton.jit(do_not_specialize=["seed", "site", "threshold", "head_offset"])
def attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, samples_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt,
    stride_vh,
    Tq, Tk, H, R, scale, keep_scale, seed, site, threshold, head_offset,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """o [B, Tq, H, D] contiguous and lse fp32 [B, H, Tq] of one tile of rows of one head."""
    tiles = tl.cdiv(Tq, BLOCK_M)
    # Neighbouring programs share a head's keys (L2); within a head the longest rows start first.
    first_row = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    b = (tl.program_id(0) // tiles // H).to(tl.int64)
    h = tl.program_id(0) // tiles % H
    sample, head = b, h
    if DROPOUT:
        sample = tl.load(samples_ptr + b)
        head = h + head_offset

    q_ptr += b * stride_qb + h.to(tl.int64) * stride_qh
    k_ptr += b * stride_kb + (h // R).to(tl.int64) * stride_kh
    v_ptr += b * stride_vb + (h // R).to(tl.int64) * stride_vh
    q = load_rows(q_ptr, stride_qt, first_row, Tq, D, BLOCK_M, WIDTH, True)
    first_position = first_row + Tk - Tq
    positions = first_position + tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    high = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    # Every row sees all keys before `unmasked`; none sees a key from `last` on.
    unmasked = (first_position + 1) // BLOCK_N * BLOCK_N
    last = tl.minimum(first_position + BLOCK_M, Tk)
    acc, high, total = attend(
        acc, high, total, q, positions, k_ptr, v_ptr, stride_kt, stride_vt, 0, unmasked, Tk, scale,
        seed, site, threshold, sample, head, D, WIDTH, BLOCK_N, False, DROPOUT,
    )  # fmt: skip
    acc, high, total = attend(
        acc, high, total, q, positions, k_ptr, v_ptr, stride_kt, stride_vt, unmasked, last, Tk,
        scale,
        seed, site, threshold, sample, head, D, WIDTH, BLOCK_N, True, DROPOUT,
    )  # fmt: skip
    o_ptr += (b * Tq * H + h) * D
    store_rows(o_ptr, H * D, first_row, Tq, acc * (keep_scale / total)[:, None], D, BLOCK_M, WIDTH)
    rows = first_row + tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + (b * H + h) * Tq + rows, high + tl.log2(total), rows < Tq)


def dropout_arguments(key: DropoutKey | None, head_offset: int) -> tuple[float, int, int, int, int]:
    """(1 / (1 - p), seed, site, threshold, head_offset) as the kernels take them."""
    if key is None:
        return 1.0, 0, 0, 0, 0
    return 1 / (1 - key.p), signed(key.seed), signed(key.site), signed(key.threshold), head_offset


def last_contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors with a last stride of 1; copies only those that have another."""
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


def forward(
    q: Tensor, k: Tensor, v: Tensor, key: DropoutKey | None, samples: Tensor | None,
    head_offset: int,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(o [B, Tq, H, D] in the dtype of q, lse in base 2, fp32 [B, H, Tq])."""
    dtype = q.dtype
    q, k, v = interpretable(*last_contiguous(q, k, v))
    B, Tq, H, D = q.shape
    Tk, K = k.shape[1], k.shape[2]
    tile = tile or tile_here("forward", q, key is not None)
    o = torch.empty((B, Tq, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, Tq), dtype=torch.float32, device=q.device)
    launch(
        attention_forward_kernel, cdiv(Tq, tile.block_m) * B * H, q.device,
        q, k, v, o, lse, samples, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        Tq, Tk, H, H // K, LOG2_E / math.sqrt(D), *dropout_arguments(key, head_offset),
        D, tile_width(D), tile.block_m, tile.block_n, key is not None,
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    return o.to(dtype), lse
