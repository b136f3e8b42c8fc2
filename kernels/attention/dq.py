"""The gradient of the queries: one program computes it for one tile of queries of one head."""

import triton
import triton.language as tl

from kernels.attention.parts import INSIDE, MAY_BEGIN, MAY_END, UNSEEN, head_of, load_rows, load_tile, store_tile
from kernels.attention.walk import first_key, key_of, keys_seen, tile_and_head
from kernels.philox import keep_tile
from kernels.softcap import tanh_of_half


@triton.jit
def walk_keys(
    dq, q, do, lse, delta, positions, lows, k_head, v_head, walk, first, last, Tk, scale, cap, keep_scale, dropout,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
    SOFTCAP: tl.constexpr, BOUNDED: tl.constexpr, SPARSE: tl.constexpr, STRIDE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Add steps first to last - 1 of the walk over the keys to dq, unscaled. MASKED: tiles the diagonal may cross."""
    begin, near, full, block = walk
    CHECK: tl.constexpr = MAY_END if MASKED else INSIDE
    for step in range(first, last, BLOCK_N):
        start = key_of(step, begin, near, block, SPARSE, STRIDE)
        k = load_tile(k_head, start, Tk, D, BLOCK_N, WIDTH, CHECK, TMA)
        v = load_tile(v_head, start, Tk, D, BLOCK_N, WIDTH, CHECK, TMA)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        scores *= scale
        slope = 1.0
        if SOFTCAP:
            tanh = tanh_of_half(scores)
            slope = 1.0 - tanh * tanh
            scores = tanh * cap
        scores -= lse[:, None]
        cols = start + tl.arange(0, BLOCK_N)
        if MASKED:
            scores = tl.where(cols[None, :] <= positions[:, None], scores, UNSEEN)
        if BOUNDED:  # noqa: SIM102 - `and` would turn this constant into a tensor
            if start < full:
                scores = tl.where(cols[None, :] >= lows[:, None], scores, UNSEEN)
        p = tl.exp2(scores)
        if DROPOUT:
            seed, site, threshold, sample, head = dropout
            keep = keep_tile(seed, site, threshold, sample, head, positions, start, BLOCK_N)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None]) * slope
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=[
    "Tq", "Tk", "origin", "section", "window", "seed", "site", "threshold", "head_offset",
])  # fmt: skip
def attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, rows_ptr, samples_ptr, starts_ptr, dq_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_dob, stride_dot, stride_doh, stride_outb, stride_outt, stride_outh, length,
    Tq, Tk, H, R, origin, section, grad_scale, window, scale, cap, keep_scale, seed, site, threshold, head_offset,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr,
    SOFTCAP: tl.constexpr, BOUNDED: tl.constexpr, SPARSE: tl.constexpr, LOCAL: tl.constexpr, STRIDE: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """dq [B, Tq, H, D] of one tile of queries of one head. rows: what attention_delta_kernel writes."""
    tiles = tl.cdiv(Tk - origin, BLOCK_M)
    tile, head = tile_and_head(tiles, section)
    b, h = head // H, head % H
    position = origin + (tiles - 1 - tile) * BLOCK_M
    row = position - (Tk - Tq)
    CHECK: tl.constexpr = MAY_BEGIN if SPARSE else MAY_END
    sample = tl.load(samples_ptr + b) if DROPOUT else b
    dropout = (seed, site, threshold, sample, h + head_offset)

    q = load_tile(head_of(q_ptr, stride_qb, stride_qt, stride_qh, b, h, TMA), row, Tq, D, BLOCK_M, WIDTH, CHECK, TMA)
    do_head = head_of(do_ptr, stride_dob, stride_dot, stride_doh, b, h, TMA)
    do = load_tile(do_head, row, Tq, D, BLOCK_M, WIDTH, CHECK, TMA)
    k_head = head_of(k_ptr, stride_kb, stride_kt, stride_kh, b, h // R, TMA)
    v_head = head_of(v_ptr, stride_vb, stride_vt, stride_vh, b, h // R, TMA)
    lse_head = rows_ptr + tl.cast(head, tl.int64) * 2 * length
    lse = load_rows(lse_head, row, Tq, float("inf"), BLOCK_M, CHECK)
    delta = load_rows(lse_head + length, row, Tq, 0.0, BLOCK_M, CHECK)
    positions = position + tl.arange(0, BLOCK_M)
    lows = first_key(starts_ptr, window, b, Tk, positions) if BOUNDED else positions
    begin, near, full, diagonal, end, block = keys_seen(
        starts_ptr, window, b, position, Tk, BLOCK_M, BLOCK_N, BOUNDED, SPARSE, LOCAL, STRIDE
    )
    walk = (begin, near, full, block)
    dq = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    dq = walk_keys(
        dq, q, do, lse, delta, positions, lows, k_head, v_head, walk, begin, diagonal, Tk, scale, cap, keep_scale,
        dropout, D, WIDTH, BLOCK_N, False, DROPOUT, SOFTCAP, BOUNDED, SPARSE, STRIDE, TMA,
    )  # fmt: skip
    dq = walk_keys(
        dq, q, do, lse, delta, positions, lows, k_head, v_head, walk, diagonal, end, Tk, scale, cap, keep_scale,
        dropout, D, WIDTH, BLOCK_N, True, DROPOUT, SOFTCAP, BOUNDED, SPARSE, STRIDE, TMA,
    )  # fmt: skip
    out, stride, _, _ = head_of(dq_ptr, stride_outb, stride_outt, stride_outh, b, h, False)
    store_tile(out, stride, row, Tq, dq * grad_scale, D, BLOCK_M, WIDTH, CHECK)
