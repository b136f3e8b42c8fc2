"""The backward pass of attention.

With P = 2^(score - lse), M the dropout mask over 1 - p (ones without dropout), delta = rowsum(dO * O) less the
gradient of lse, and t the tanh of softcap (0 without):
    dV = (P * M)^T dO,  dS = P * (M * (dO V^T) - delta) * (1 - t^2),  dQ = dS K / sqrt(D),  dK = dS^T Q / sqrt(D)
(Dao et al. 2022, algorithm 4; delta is right with dropout because O already holds M).
Deterministic: one kernel loops over the queries for a tile of keys (dkdv.py), another over the keys for a tile of
queries (dq.py). Both recompute P, and every run gives the same bits. Otherwise the first kernel does all of it, adding
to dQ by atomic additions.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.dkdv import attention_dkdv_kernel
from kernels.attention.dq import attention_dq_kernel
from kernels.attention.options import LOG2_E, Options
from kernels.attention.parts import MAY_END, head_of, load_tile
from kernels.attention.problem import Problem, head_strides
from kernels.attention.tiles import Tile, tile_width
from kernels.dispatch import cdiv, empty_like, readable, rounded
from kernels.plan import Plan, planned

DELTA_ROWS = 16
LONGEST_TILE = 128  # of queries
CAST_ELEMENTS = 4096


@triton.jit(do_not_specialize=["Tq"])
def attention_delta_kernel(
    o_ptr, do_ptr, lse_ptr, dlse_ptr, rows_ptr, stride_dob, stride_dot, stride_doh,
    stride_dlseb, stride_dlseh, stride_dlset, Tq, H, length, log2_e,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Write rows fp32 [B, H, 2, length]: lse, and delta, the rowsum of o do (o [B, Tq, H, D] contiguous) less the
    base-2 gradient of lse. In the padding P and dS vanish: lse is infinite there, delta 0.
    """
    tiles = length // BLOCK_M
    first = tl.program_id(0) % tiles * BLOCK_M
    head = tl.program_id(0) // tiles
    b, h = head // H, head % H
    o_head = head_of(o_ptr, Tq * H * D, H * D, D, b, h, False)
    do_head = head_of(do_ptr, stride_dob, stride_dot, stride_doh, b, h, False)
    o = load_tile(o_head, first, Tq, D, BLOCK_M, WIDTH, MAY_END, False).to(tl.float32)
    do = load_tile(do_head, first, Tq, D, BLOCK_M, WIDTH, MAY_END, False).to(tl.float32)
    delta = tl.sum(o * do, 1)
    rows = first + tl.arange(0, BLOCK_M)
    if dlse_ptr is not None:
        dlse_head, stride, _, _ = head_of(dlse_ptr, stride_dlseb, stride_dlset, stride_dlseh, b, h, False)
        delta -= tl.load(dlse_head + tl.cast(rows, tl.int64) * stride, rows < Tq, 0.0) * log2_e
    lse = tl.load(lse_ptr + tl.cast(head, tl.int64) * Tq + rows, rows < Tq, float("inf"))
    rows_head = rows_ptr + tl.cast(head, tl.int64) * 2 * length + rows
    tl.store(rows_head, lse)
    tl.store(rows_head + length, delta)


@triton.jit(do_not_specialize=["elements"])
def scale_and_cast_kernel(x_ptr, y_ptr, elements, scale, stride, D: tl.constexpr, BLOCK: tl.constexpr):
    """y = x * scale in the dtype of y: x contiguous, y in rows of D with a stride."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x_ptr + at, at < elements) * scale
    tl.store(y_ptr + at // D * stride + at % D, y.to(y_ptr.dtype.element_ty), at < elements)


def padded_length(Tq: int) -> int:
    return cdiv(Tq, LONGEST_TILE) * LONGEST_TILE


def delta_plan(problem: Problem, dlse_strides: tuple[int, ...]) -> Plan:
    """Of attention_delta_kernel."""
    B, Tq, _, H, _, D = problem.sizes
    length = padded_length(Tq)
    return Plan(
        attention_delta_kernel, length // DELTA_ROWS * B * H, problem.device,
        *head_strides(problem.strides[3]), *dlse_strides, Tq, H, length, LOG2_E, D, tile_width(D), DELTA_ROWS,
    )  # fmt: skip


@planned
def plans_of(
    problem: Problem, dlse_strides: tuple[int, ...], out_strides: tuple[tuple[int, ...], ...],
    tiles: tuple[Tile, Tile] | None,
) -> tuple[Plan, Plan, Plan]:  # fmt: skip
    """(of attention_delta_kernel, of dkdv, of dq or if fused of what casts the sums).

    out_strides: of dq and of dk and dv. tiles: of the dkdv (or fused) and the dq kernel.
    """
    B, Tq, Tk, H, K, D = problem.sizes
    device, length, fused = problem.device, padded_length(Tq), not problem.options.deterministic
    one, two = tiles or (problem.tile(kind) for kind in ("fused" if fused else "dkdv", "dq"))
    delta = delta_plan(problem, dlse_strides)

    def products(kernel: Any, programs: int, tile: Tile, out: tuple[int, ...], section: int, *form: bool) -> Plan:
        strides = head_strides(*problem.strides, out)
        return Plan(
            kernel, programs, device, *strides, length, Tq, Tk, H, H // K, problem.origin(tile), section,
            1 / math.sqrt(D), *problem.numbers, D, tile_width(D), tile.block_m, tile.block_n, *problem.flags, tile.tma,
            *form, warps=tile.warps, stages=tile.stages, layouts=problem.layouts(tile),
        )  # fmt: skip

    row_bytes = 2 * D * problem.dtype.itemsize  # of k and v; of q and do, beside the sums
    of_keys = problem.section(Tq * (row_bytes + 4 * D * fused) * (H // K), 1)
    keys = products(attention_dkdv_kernel, cdiv(Tk, one.block_n) * B * K, one, out_strides[1], of_keys, fused)
    if fused:
        size = B * Tq * H * D
        scaled = size, 1 / math.sqrt(D), out_strides[0][2], D, CAST_ELEMENTS
        return delta, keys, Plan(scale_and_cast_kernel, cdiv(size, CAST_ELEMENTS), device, *scaled)
    programs = cdiv(Tk - problem.origin(two), two.block_m) * B * H
    of_queries = problem.section(Tk * row_bytes, H // K)
    return delta, keys, products(attention_dq_kernel, programs, two, out_strides[0], of_queries)


def backward(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, options: Options,
    samples: Tensor | None = None, bounds: Tensor | None = None, tiles: tuple[Tile, Tile] | None = None,
    packed: bool = False,
) -> list[Tensor]:  # fmt: skip
    """Return dq, dk, dv, contiguous, or if `packed` one tensor [B, T, H, 3, D] of them.

    tiles: of the dkdv (or fused) and the dq kernel; by default from the tables.
    """
    dtype = q.dtype
    q, k, v, do, o = readable(q, k, v, do, o)
    B, Tq, H, D = q.shape
    if packed:
        found = [q.new_empty(B, Tq, H, 3, D)]
        dq, dk, dv = found[0].unbind(3)
    else:
        found = dq, dk, dv = empty_like(q), empty_like(k), empty_like(v)
    problem = Problem.of(options, bounds is not None, q, k, v, do)
    of_delta, of_keys, of_queries = plans_of(
        problem, (0, 0, 0) if dlse is None else dlse.stride(), (dq.stride(), dk.stride()), tiles
    )
    rows = q.new_empty(B, H, 2, padded_length(Tq), dtype=torch.float32)
    starts, ends = (None, None) if bounds is None else bounds.unbind()
    of_delta(o.contiguous(), do, lse, dlse, rows)
    sums = None if options.deterministic else q.new_zeros(q.shape, dtype=torch.float32)
    of_keys(q, k, v, do, rows, samples, ends, sums, dk, dv)
    if sums is None:
        of_queries(q, k, v, do, rows, samples, starts, dq)
    else:
        of_queries(sums, dq)
    return [rounded(x, dtype) for x in found]
