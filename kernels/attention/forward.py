"""The forward pass of attention: one program computes one tile of queries of one head.

Online softmax in base 2 (Milakov & Gimelshein 2018; Dao et al. 2022): the maximum is that of raw scores, so that their
scale log2(e) / sqrt(D) and its subtraction are one operation. lse = log2(sum of 2^score) is kept for the backward pass.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.options import Options
from kernels.attention.parts import INSIDE, MAY_BEGIN, MAY_END, UNSEEN, head_of, load_tile, rows_inside, store_tile
from kernels.attention.problem import Problem, head_strides
from kernels.attention.tiles import Tile, tile_width
from kernels.attention.walk import first_key, key_of, keys_seen, tile_and_head
from kernels.dispatch import cdiv, empty_like, readable, rounded
from kernels.philox import keep_tile
from kernels.plan import Plan, planned
from kernels.softcap import tanh_of_half


@triton.jit
def attend(
    acc, high, total, q, positions, lows, k_head, v_head, walk, first, last, Tk, scale, cap, dropout,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
    SOFTCAP: tl.constexpr, BOUNDED: tl.constexpr, SPARSE: tl.constexpr, STRIDE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Fold steps first to last - 1 of the walk over the keys into the sums. MASKED: tiles the diagonal may cross."""
    begin, near, full, block = walk
    unit = 1.0 if SOFTCAP else scale  # of a score, in base 2
    CHECK: tl.constexpr = MAY_END if MASKED else INSIDE
    for step in range(first, last, BLOCK_N):
        start = key_of(step, begin, near, block, SPARSE, STRIDE)
        k = load_tile(k_head, start, Tk, D, BLOCK_N, WIDTH, CHECK, TMA)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if SOFTCAP:
            scores = tanh_of_half(scores * scale) * cap
        cols = start + tl.arange(0, BLOCK_N)
        if MASKED:
            scores = tl.where(cols[None, :] <= positions[:, None], scores, UNSEEN)
        if BOUNDED:  # noqa: SIM102 - `and` would turn this constant into a tensor
            if start < full:
                scores = tl.where(cols[None, :] >= lows[:, None], scores, UNSEEN)
        higher = tl.maximum(high, tl.max(scores, 1))
        shrink = tl.exp2((high - higher) * unit)
        weights = tl.exp2(scores * unit - (higher * unit)[:, None])
        total = total * shrink + tl.sum(weights, 1)
        if DROPOUT:
            seed, site, threshold, sample, head = dropout
            keep = keep_tile(seed, site, threshold, sample, head, positions, start, BLOCK_N)
            weights = tl.where(keep, weights, 0.0)
        v = load_tile(v_head, start, Tk, D, BLOCK_N, WIDTH, CHECK, TMA)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        high = higher
    return acc, high, total


@triton.jit(do_not_specialize=[
    "Tq", "Tk", "origin", "section", "window", "seed", "site", "threshold", "head_offset",
])  # fmt: skip
def attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, samples_ptr, starts_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    Tq, Tk, H, R, origin, section, window, scale, cap, keep_scale, seed, site, threshold, head_offset,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr,
    SOFTCAP: tl.constexpr, BOUNDED: tl.constexpr, SPARSE: tl.constexpr, LOCAL: tl.constexpr, STRIDE: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Write o [B, Tq, H, D] contiguous and lse fp32 [B, H, Tq] of one tile of queries of one head."""
    tiles = tl.cdiv(Tk - origin, BLOCK_M)
    tile, head = tile_and_head(tiles, section)
    b, h = head // H, head % H
    # The last tile has the most keys: the longest start first.
    position = origin + (tiles - 1 - tile) * BLOCK_M
    row = position - (Tk - Tq)
    CHECK: tl.constexpr = MAY_BEGIN if SPARSE else MAY_END
    sample = tl.load(samples_ptr + b) if DROPOUT else b
    dropout = (seed, site, threshold, sample, h + head_offset)

    q_head = head_of(q_ptr, stride_qb, stride_qt, stride_qh, b, h, TMA)
    k_head = head_of(k_ptr, stride_kb, stride_kt, stride_kh, b, h // R, TMA)
    v_head = head_of(v_ptr, stride_vb, stride_vt, stride_vh, b, h // R, TMA)
    q = load_tile(q_head, row, Tq, D, BLOCK_M, WIDTH, CHECK, TMA)
    positions = position + tl.arange(0, BLOCK_M)
    lows = first_key(starts_ptr, window, b, Tk, positions) if BOUNDED else positions
    begin, near, full, diagonal, end, block = keys_seen(
        starts_ptr, window, b, position, Tk, BLOCK_M, BLOCK_N, BOUNDED, SPARSE, LOCAL, STRIDE
    )
    walk = (begin, near, full, block)
    acc = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    high = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc, high, total = attend(
        acc, high, total, q, positions, lows, k_head, v_head, walk, begin, diagonal, Tk, scale, cap, dropout,
        D, WIDTH, BLOCK_N, False, DROPOUT, SOFTCAP, BOUNDED, SPARSE, STRIDE, TMA,
    )  # fmt: skip
    acc, high, total = attend(
        acc, high, total, q, positions, lows, k_head, v_head, walk, diagonal, end, Tk, scale, cap, dropout,
        D, WIDTH, BLOCK_N, True, DROPOUT, SOFTCAP, BOUNDED, SPARSE, STRIDE, TMA,
    )  # fmt: skip
    rows, within = rows_inside(row, Tq, BLOCK_M, CHECK)
    o = acc * (keep_scale / total)[:, None]
    store_tile(o_ptr + (tl.cast(b, tl.int64) * Tq * H + h) * D, H * D, row, Tq, o, D, BLOCK_M, WIDTH, CHECK)
    lse = high * (1.0 if SOFTCAP else scale) + tl.log2(total)
    tl.store(lse_ptr + tl.cast(head, tl.int64) * Tq + rows, lse, within)


@planned
def plan_of(problem: Problem, tile: Tile | None) -> Plan:
    B, Tq, Tk, H, K, D = problem.sizes
    tile = tile or problem.tile("forward")
    origin, section = problem.origin(tile), problem.section(2 * Tk * D * problem.dtype.itemsize, H // K)
    return Plan(
        attention_forward_kernel, cdiv(Tk - origin, tile.block_m) * B * H, problem.device,
        *head_strides(*problem.strides), Tq, Tk, H, H // K, origin, section, *problem.numbers,
        D, tile_width(D), tile.block_m, tile.block_n, *problem.flags, tile.tma,
        warps=tile.warps, stages=tile.stages, layouts=problem.layouts(tile),
    )  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor, options: Options, samples: Tensor | None = None, bounds: Tensor | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return o [B, Tq, H, D] in the dtype of q and lse in base 2, fp32 [B, H, Tq].

    bounds: of documents (documents.py). tile: by default from the tables.
    """
    dtype = q.dtype
    q, k, v = readable(q, k, v)
    B, Tq, H, _ = q.shape
    o, lse = empty_like(q), q.new_empty(B, H, Tq, dtype=torch.float32)
    plan = plan_of(Problem.of(options, bounds is not None, q, k, v), tile)
    plan(q, k, v, o, lse, samples, None if bounds is None else bounds[0])
    return rounded(o, dtype), lse
