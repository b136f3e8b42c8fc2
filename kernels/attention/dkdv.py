"""The gradients of keys and values: one program computes them for one tile of keys of one key/value head.

With FUSED the program also adds its tile's part of dQ to an fp32 buffer, by atomic additions. This saves two matrix
products, because a separate kernel for dQ computes P and dP again. But the sums change their order from run to run.
"""

import triton
import triton.language as tl

from kernels.attention.parts import MAY_BEGIN, MAY_END, head_of, inside, load_rows, load_tile, store_tile
from kernels.attention.walk import last_query, queries_seeing, query_of, tile_and_head
from kernels.philox import keep_tile
from kernels.softcap import tanh_of_half


@triton.jit
def add_tile(
    ptr, stride, first, limit, tile, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Add `tile` to fp32 rows `first` on, in any order with other programs."""
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, WIDTH)
    ptrs = ptr + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + cols[None, :]
    tl.atomic_add(ptrs, tile, inside(first, limit, D, ROWS, WIDTH, CHECK), sem="relaxed")


@triton.jit
def walk_queries(
    dk, dv, k, v, first_col, highs, q_head, do_head, lse_ptr, length, dq_ptr, stride_dq, walk, Tq, Tk, scale, cap,
    keep_scale, dropout,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr,
    SOFTCAP: tl.constexpr, BOUNDED: tl.constexpr, SPARSE: tl.constexpr, STRIDE: tl.constexpr, TMA: tl.constexpr,
    FUSED: tl.constexpr,
):  # fmt: skip
    """Add one query head's part of dk, dv (and dq), unscaled; [keys, queries], so that P and dS are left operands."""
    begin, far, end, full, block = walk
    cols = first_col + tl.arange(0, BLOCK_N)
    CHECK: tl.constexpr = MAY_BEGIN if SPARSE else MAY_END
    for step in range(begin, end, BLOCK_M):
        position = query_of(step, far, block, SPARSE, STRIDE)
        positions = position + tl.arange(0, BLOCK_M)
        row = position - (Tk - Tq)
        q = load_tile(q_head, row, Tq, D, BLOCK_M, WIDTH, CHECK, TMA)
        do = load_tile(do_head, row, Tq, D, BLOCK_M, WIDTH, CHECK, TMA)
        # Rows past the end get P = 2^(0 - inf) = 0.
        lse = load_rows(lse_ptr, row, Tq, float("inf"), BLOCK_M, CHECK)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        scores *= scale
        slope = 1.0
        if SOFTCAP:
            tanh = tanh_of_half(scores)
            slope = 1.0 - tanh * tanh
            scores = tanh * cap
        # A masked score may have overflowed: its P is dropped here, not added to.
        p = tl.exp2(scores - lse[None, :])
        if (position < first_col + BLOCK_N - 1) | (position + BLOCK_M > full):
            seen = cols[:, None] <= positions[None, :]
            if BOUNDED:
                seen &= positions[None, :] <= highs[:, None]
            p = tl.where(seen, p, 0.0)
        kept = p
        if DROPOUT:
            seed, site, threshold, sample, head = dropout
            keep = tl.trans(keep_tile(seed, site, threshold, sample, head, positions, first_col, BLOCK_N))
            kept = tl.where(keep, p, 0.0)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        dv = tl.dot(kept.to(do.dtype), do, dv, input_precision="ieee")
        delta = load_rows(lse_ptr + length, row, Tq, 0.0, BLOCK_M, CHECK)
        ds = (p * (dp - delta[None, :]) * slope).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision="ieee")
        if FUSED:
            part = tl.dot(tl.trans(ds), k, input_precision="ieee")
            add_tile(dq_ptr, stride_dq, row, Tq, part, D, BLOCK_M, WIDTH, CHECK)
    return dk, dv


@triton.jit(do_not_specialize=[
    "Tq", "Tk", "origin", "section", "window", "seed", "site", "threshold", "head_offset",
])  # fmt: skip
def attention_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, rows_ptr, samples_ptr, ends_ptr, dq_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_dob, stride_dot, stride_doh, stride_outb, stride_outt, stride_outh, length,
    Tq, Tk, H, R, origin, section, grad_scale, window, scale, cap, keep_scale, seed, site, threshold, head_offset,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr,
    SOFTCAP: tl.constexpr, BOUNDED: tl.constexpr, SPARSE: tl.constexpr, LOCAL: tl.constexpr, STRIDE: tl.constexpr,
    TMA: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """Write dk, dv [B, Tk, K, D] of one tile of keys over R query heads. FUSED: add to dq [B, Tq, H, D], unscaled.

    rows: what attention_delta_kernel writes. stride_out: of dk and of dv.
    """
    K = H // R
    # Keys early in the sequence are seen by the most queries: the longest start first.
    tiles = tl.cdiv(Tk, BLOCK_N)
    tile, head = tile_and_head(tiles, section)
    b, kv_head = head // K, head % K
    first_col = tile * BLOCK_N
    sample = tl.load(samples_ptr + b) if DROPOUT else b

    k_head = head_of(k_ptr, stride_kb, stride_kt, stride_kh, b, kv_head, TMA)
    v_head = head_of(v_ptr, stride_vb, stride_vt, stride_vh, b, kv_head, TMA)
    k = load_tile(k_head, first_col, Tk, D, BLOCK_N, WIDTH, MAY_END, TMA)
    v = load_tile(v_head, first_col, Tk, D, BLOCK_N, WIDTH, MAY_END, TMA)
    cols = first_col + tl.arange(0, BLOCK_N)
    highs = last_query(ends_ptr, window, b, Tk, cols) if BOUNDED else cols
    walk = queries_seeing(ends_ptr, window, b, first_col, origin, Tk, BLOCK_M, BLOCK_N, BOUNDED, SPARSE, LOCAL, STRIDE)
    dk = tl.zeros((BLOCK_N, WIDTH), tl.float32)
    dv = tl.zeros((BLOCK_N, WIDTH), tl.float32)
    for r in range(R):
        h = kv_head * R + r
        q_head = head_of(q_ptr, stride_qb, stride_qt, stride_qh, b, h, TMA)
        do_head = head_of(do_ptr, stride_dob, stride_dot, stride_doh, b, h, TMA)
        lse_head = rows_ptr + tl.cast(b * H + h, tl.int64) * 2 * length
        dq_head = dq_ptr + (tl.cast(b, tl.int64) * Tq * H + h) * D if FUSED else dq_ptr
        dk, dv = walk_queries(
            dk, dv, k, v, first_col, highs, q_head, do_head, lse_head, length, dq_head, H * D,
            walk, Tq, Tk, scale, cap, keep_scale, (seed, site, threshold, sample, h + head_offset),
            D, WIDTH, BLOCK_M, BLOCK_N, DROPOUT, SOFTCAP, BOUNDED, SPARSE, STRIDE, TMA, FUSED,
        )  # fmt: skip
    out = tl.cast(b, tl.int64) * stride_outb + tl.cast(kv_head, tl.int64) * stride_outh
    store_tile(dk_ptr + out, stride_outt, first_col, Tk, dk * grad_scale, D, BLOCK_N, WIDTH, MAY_END)
    store_tile(dv_ptr + out, stride_outt, first_col, Tk, dv * keep_scale, D, BLOCK_N, WIDTH, MAY_END)
