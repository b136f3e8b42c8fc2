"""The backward pass, without atomic additions, so that every run gives the same bits.

With P = 2^(score - lse), M the dropout mask over 1 - p (ones without dropout), delta = rowsum(dO * O):
    dV = (P * M)^T dO,  dS = P * (M * (dO V^T) - delta),  dQ = dS K / sqrt(D),  dK = dS^T Q / sqrt(D)
(Dao et al. 2022, algorithm 4; delta is right with dropout because O already holds M).
One kernel walks down the queries for a tile of keys, one along the keys for a tile of queries; both
recompute P.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.forward import LOG2_E, dropout_arguments, last_contiguous
from kernels.attention.tiles import Tile, load_rows, store_rows, tile_here, tile_width
from kernels.dispatch import cdiv, interpretable, launch
from kernels.philox import DropoutKey, keep_tile

DELTA_ROWS = 16


@triton.jit
def attention_delta_kernel(
    o_ptr, do_ptr, delta_ptr, stride_dob, stride_dot, stride_doh, Tq, H,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta fp32 [B, H, Tq]: each row of o [B, Tq, H, D], contiguous, times that of its gradient."""
    tiles = tl.cdiv(Tq, BLOCK_M)
    first_row = tl.program_id(0) % tiles * BLOCK_M
    b = (tl.program_id(0) // tiles // H).to(tl.int64)
    h = tl.program_id(0) // tiles % H
    o_ptr += (b * Tq * H + h) * D
    do_ptr += b * stride_dob + h.to(tl.int64) * stride_doh
    o = load_rows(o_ptr, H * D, first_row, Tq, D, BLOCK_M, WIDTH, True).to(tl.float32)
    do = load_rows(do_ptr, stride_dot, first_row, Tq, D, BLOCK_M, WIDTH, True).to(tl.float32)
    rows = first_row + tl.arange(0, BLOCK_M)
    tl.store(delta_ptr + (b * H + h) * Tq + rows, tl.sum(o * do, 1), rows < Tq)


@triton.jit
def walk_queries(
    dk, dv, k, v, cols, q_ptr, do_ptr, lse_ptr, delta_ptr, stride_qt, stride_dot, first, Tq, Tk,
    scale,
    keep_scale, seed, site, threshold, sample, head,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """Add what the query rows of one head from `first` on give to dk and dv, without their scale.

    Everything is transposed, [keys, queries], so that P and dS are left operands. Every tile is
    masked: a second loop for those below the diagonal made the compiler spill.
    """
    for start in range(first, Tq, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        positions = rows + (Tk - Tq)
        q = load_rows(q_ptr, stride_qt, start, Tq, D, BLOCK_M, WIDTH, True)
        do = load_rows(do_ptr, stride_dot, start, Tq, D, BLOCK_M, WIDTH, True)
        # Rows past the end get P = 2^(0 - inf) = 0.
        lse = tl.load(lse_ptr + rows, rows < Tq, float("inf"))
        delta = tl.load(delta_ptr + rows, rows < Tq, 0.0)
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale - lse[None, :])
        # A masked score may have overflowed: it is dropped here, not added to.
        p = tl.where(cols[:, None] <= positions[None, :], p, 0.0)
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        kept = p
        if DROPOUT:
            keep = keep_tile(seed, site, threshold, sample, head, positions, tl.min(cols, 0), BLOCK_N)
            keep = tl.trans(keep)
            kept = tl.where(keep, p, 0.0)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        dv = tl.dot(kept.to(do.dtype), do, dv, input_precision="ieee")
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["seed", "site", "threshold", "head_offset"])
def attention_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, samples_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt,
    stride_vh,
    stride_dob, stride_dot, stride_doh,
    Tq, Tk, H, R, scale, keep_scale, seed, site, threshold, head_offset,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """dk, dv [B, Tk, K, D] contiguous: one tile of keys of one head, over its R query heads."""
    tiles = tl.cdiv(Tk, BLOCK_N)
    K = H // R
    # Keys early in the sequence are seen by the most queries: program order already starts the
    # longest first.
    first_col = tl.program_id(0) % tiles * BLOCK_N
    b = (tl.program_id(0) // tiles // K).to(tl.int64)
    kv_head = tl.program_id(0) // tiles % K
    sample = b
    if DROPOUT:
        sample = tl.load(samples_ptr + b)

    k_ptr += b * stride_kb + kv_head.to(tl.int64) * stride_kh
    v_ptr += b * stride_vb + kv_head.to(tl.int64) * stride_vh
    k = load_rows(k_ptr, stride_kt, first_col, Tk, D, BLOCK_N, WIDTH, True)
    v = load_rows(v_ptr, stride_vt, first_col, Tk, D, BLOCK_N, WIDTH, True)
    cols = first_col + tl.arange(0, BLOCK_N)
    dk = tl.zeros((BLOCK_N, WIDTH), tl.float32)
    dv = tl.zeros((BLOCK_N, WIDTH), tl.float32)
    # No row before `first` sees a key of this tile.
    first = tl.maximum(first_col - (Tk - Tq), 0) // BLOCK_M * BLOCK_M
    for r in range(R):
        h = kv_head * R + r
        q_head = q_ptr + b * stride_qb + h.to(tl.int64) * stride_qh
        do_head = do_ptr + b * stride_dob + h.to(tl.int64) * stride_doh
        lse_head = lse_ptr + (b * H + h) * Tq
        delta_head = delta_ptr + (b * H + h) * Tq
        dk, dv = walk_queries(
            dk, dv, k, v, cols, q_head, do_head, lse_head, delta_head, stride_qt, stride_dot, first,
            Tq, Tk, scale, keep_scale, seed, site, threshold, sample, h + head_offset,
            D, WIDTH, BLOCK_M, BLOCK_N, DROPOUT,
        )  # fmt: skip
    out = (b * Tk * K + kv_head) * D
    # scale is log2(e) / sqrt(D); the gradient wants 1 / sqrt(D).
    store_rows(dk_ptr + out, K * D, first_col, Tk, dk * (scale * 0.6931471805599453), D, BLOCK_N, WIDTH)
    store_rows(dv_ptr + out, K * D, first_col, Tk, dv * keep_scale, D, BLOCK_N, WIDTH)


@triton.jit
def walk_keys(
    dq, q, do, lse, delta, positions, k_ptr, v_ptr, stride_kt, stride_vt, first, last, Tk, scale,
    keep_scale, seed, site, threshold, sample, head,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """Add what keys first to last - 1 give to dq [BLOCK_M, WIDTH] (without its scale)."""
    for start in range(first, last, BLOCK_N):
        k = load_rows(k_ptr, stride_kt, start, Tk, D, BLOCK_N, WIDTH, MASKED)
        v = load_rows(v_ptr, stride_vt, start, Tk, D, BLOCK_N, WIDTH, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale - lse[:, None]
        if MASKED:
            cols = start + tl.arange(0, BLOCK_N)
            scores = tl.where(cols[None, :] <= positions[:, None], scores, float("-inf"))
        p = tl.exp2(scores)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        if DROPOUT:
            keep = keep_tile(seed, site, threshold, sample, head, positions, start, BLOCK_N)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=["seed", "site", "threshold", "head_offset"])
def attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, samples_ptr, dq_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt,
    stride_vh,
    stride_dob, stride_dot, stride_doh,
    Tq, Tk, H, R, scale, keep_scale, seed, site, threshold, head_offset,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """dq [B, Tq, H, D] contiguous of one tile of queries of one head."""
    tiles = tl.cdiv(Tq, BLOCK_M)
    first_row = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    b = (tl.program_id(0) // tiles // H).to(tl.int64)
    h = tl.program_id(0) // tiles % H
    sample, head = b, h
    if DROPOUT:
        sample = tl.load(samples_ptr + b)
        head = h + head_offset

    q_ptr += b * stride_qb + h.to(tl.int64) * stride_qh
    do_ptr += b * stride_dob + h.to(tl.int64) * stride_doh
    k_ptr += b * stride_kb + (h // R).to(tl.int64) * stride_kh
    v_ptr += b * stride_vb + (h // R).to(tl.int64) * stride_vh
    q = load_rows(q_ptr, stride_qt, first_row, Tq, D, BLOCK_M, WIDTH, True)
    do = load_rows(do_ptr, stride_dot, first_row, Tq, D, BLOCK_M, WIDTH, True)
    rows = first_row + tl.arange(0, BLOCK_M)
    lse = tl.load(lse_ptr + (b * H + h) * Tq + rows, rows < Tq, float("inf"))
    delta = tl.load(delta_ptr + (b * H + h) * Tq + rows, rows < Tq, 0.0)
    first_position = first_row + Tk - Tq
    positions = first_position + tl.arange(0, BLOCK_M)
    unmasked = (first_position + 1) // BLOCK_N * BLOCK_N
    last = tl.minimum(first_position + BLOCK_M, Tk)
    dq = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    dq = walk_keys(
        dq, q, do, lse, delta, positions, k_ptr, v_ptr, stride_kt, stride_vt, 0, unmasked, Tk,
        scale,
        keep_scale, seed, site, threshold, sample, head, D, WIDTH, BLOCK_N, False, DROPOUT,
    )  # fmt: skip
    dq = walk_keys(
        dq, q, do, lse, delta, positions, k_ptr, v_ptr, stride_kt, stride_vt, unmasked, last, Tk,
        scale,
        keep_scale, seed, site, threshold, sample, head, D, WIDTH, BLOCK_N, True, DROPOUT,
    )  # fmt: skip
    dq_ptr += (b * Tq * H + h) * D
    store_rows(dq_ptr, H * D, first_row, Tq, dq * (scale * 0.6931471805599453), D, BLOCK_M, WIDTH)


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, key: DropoutKey | None,
    samples: Tensor | None, head_offset: int, tiles: tuple[Tile, Tile] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv), contiguous, from do [B, Tq, H, D] and what the forward took and gave.

    tiles: of the dkdv and the dq kernel; by default those of kernels/attention/tiles.py.
    """
    dtype = q.dtype
    do, q, k, v = interpretable(*last_contiguous(do, q, k, v))
    (o,) = interpretable(o.contiguous())
    B, Tq, H, D = q.shape
    Tk, K = k.shape[1], k.shape[2]
    dkdv, dq_tile = tiles or tuple(tile_here(kind, q, key is not None) for kind in ("dkdv", "dq"))
    dq, dk, dv = (torch.empty(t.shape, dtype=q.dtype, device=q.device) for t in (q, k, v))
    delta = torch.empty_like(lse)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3])
    scalars = (Tq, Tk, H, H // K, LOG2_E / math.sqrt(D), *dropout_arguments(key, head_offset))
    launch(
        attention_delta_kernel, cdiv(Tq, DELTA_ROWS) * B * H, q.device,
        o, do, delta, *do.stride()[:3], Tq, H, D, tile_width(D), DELTA_ROWS,
    )  # fmt: skip
    launch(
        attention_dkdv_kernel, cdiv(Tk, dkdv.block_n) * B * K, q.device,
        q, k, v, do, lse, delta, samples, dk, dv, *strides, *scalars,
        D, tile_width(D), dkdv.block_m, dkdv.block_n, key is not None,
        warps=dkdv.warps, stages=dkdv.stages,
    )  # fmt: skip
    launch(
        attention_dq_kernel, cdiv(Tq, dq_tile.block_m) * B * H, q.device,
        q, k, v, do, lse, delta, samples, dq, *strides, *scalars,
        D, tile_width(D), dq_tile.block_m, dq_tile.block_n, key is not None,
        warps=dq_tile.warps, stages=dq_tile.stages,
    )  # fmt: skip
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)
