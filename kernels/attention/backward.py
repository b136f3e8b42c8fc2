"""The backward pass of attention.

With P = 2^(score - lse), M the dropout mask over 1 - p (ones without dropout), delta = rowsum(dO * O) less the
gradient of lse, and t the tanh of softcap (0 without):
    dV = (P * M)^T dO,  dS = P * (M * (dO V^T) - delta) * (1 - t^2),  dQ = dS K / sqrt(D),  dK = dS^T Q / sqrt(D)
(Dao et al. 2022, algorithm 4; delta is right with dropout because O already holds M).
Deterministic: one kernel loops over the queries for a tile of keys (dkdv.py), another over the keys for a tile of
queries (dq.py). Both recompute P, and every run gives the same bits. Otherwise the first kernel does all of it, adding
to dQ by atomic additions.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.dkdv import attention_dkdv_kernel
from kernels.attention.dq import attention_dq_kernel
from kernels.attention.options import LOG2_E, Options, flags, scalars
from kernels.attention.parts import MAY_END, document_bounds, head_of, load_tile
from kernels.attention.tiles import (
    Tile,
    describable,
    loadable,
    origin_of,
    section_of,
    sources,
    tile_for_device,
    tile_width,
)  # fmt: skip
from kernels.dispatch import cdiv, launch

DELTA_ROWS = 16
CAST_ELEMENTS = 4096


@triton.jit(do_not_specialize=["Tq"])
def attention_delta_kernel(
    o_ptr, do_ptr, dlse_ptr, delta_ptr, stride_dob, stride_dot, stride_doh, stride_dlseb, stride_dlseh, stride_dlset,
    Tq, H, log2_e,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Write delta fp32 [B, H, Tq], the rowsum of o do (o [B, Tq, H, D] contiguous) less the base-2 gradient of lse."""
    tiles = tl.cdiv(Tq, BLOCK_M)
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
    tl.store(delta_ptr + tl.cast(head, tl.int64) * Tq + rows, delta, rows < Tq)


@triton.jit(do_not_specialize=["elements"])
def scale_and_cast_kernel(x_ptr, y_ptr, elements, scale, BLOCK: tl.constexpr):
    """y = x * scale in the dtype of y, both contiguous."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x_ptr + at, at < elements) * scale
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), at < elements)


def delta_of(do: Tensor, o: Tensor, dlse: Tensor | None) -> Tensor:
    """Return rowsum(do * o) less the gradient of lse, fp32 [B, H, Tq]."""
    B, Tq, H, D = o.shape
    delta = torch.empty((B, H, Tq), dtype=torch.float32, device=o.device)
    dlse_strides = (0, 0, 0) if dlse is None else dlse.stride()
    launch(
        attention_delta_kernel, cdiv(Tq, DELTA_ROWS) * B * H, o.device,
        o, do, dlse, delta, *do.stride()[:3], *dlse_strides, Tq, H, LOG2_E, D, tile_width(D), DELTA_ROWS,
    )  # fmt: skip
    return delta


def launch_dkdv(
    inputs: tuple[Tensor, ...], saved: tuple[Tensor, ...], samples: Tensor | None, ends: Tensor | None,
    gradients: tuple[Tensor | None, ...], options: Options, switched: tuple, tile: Tile,
) -> None:  # fmt: skip
    """inputs: q, k, v, do. saved: lse, delta. gradients: fp32 sums for dq (None if not fused), dk, dv."""
    q, k, v, do = inputs
    (B, Tq, H, D), (_, Tk, K, _) = q.shape, k.shape
    m, n = tile.block_m, tile.block_n
    loaded, strides = sources(tile, (q, m), (k, n), (v, n), (do, m))
    fused = gradients[0] is not None
    bytes_per_row = 2 * D * q.element_size() + 4 * D * fused  # of q, do and the sums
    launch(
        attention_dkdv_kernel, cdiv(Tk, n) * B * K, q.device,
        *loaded, *saved, samples, ends, *gradients, *strides, Tq, Tk, H, H // K, origin_of(Tq, Tk, options, tile),
        section_of(q, Tq * bytes_per_row * (H // K), 1), 1 / math.sqrt(D), *scalars(options, D, Tk),
        D, tile_width(D), m, n, *switched, tile.tma, fused, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip


def launch_dq(
    inputs: tuple[Tensor, ...], saved: tuple[Tensor, ...], samples: Tensor | None, starts: Tensor | None,
    dq: Tensor, options: Options, switched: tuple, tile: Tile,
) -> None:  # fmt: skip
    """inputs: q, k, v, do. saved: lse, delta."""
    q, k, v, do = inputs
    (B, Tq, H, D), (_, Tk, K, _) = q.shape, k.shape
    m, n = tile.block_m, tile.block_n
    loaded, strides = sources(tile, (q, m), (k, n), (v, n), (do, m))
    origin = origin_of(Tq, Tk, options, tile)
    launch(
        attention_dq_kernel, cdiv(Tk - origin, m) * B * H, q.device,
        *loaded, *saved, samples, starts, dq, *strides, Tq, Tk, H, H // K, origin,
        section_of(q, 2 * Tk * D * q.element_size(), H // K), 1 / math.sqrt(D), *scalars(options, D, Tk),
        D, tile_width(D), m, n, *switched, tile.tma, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip


def backward(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, options: Options,
    samples: Tensor | None = None, cu_seqlens: Tensor | None = None, tiles: tuple[Tile, Tile] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (dq, dk, dv), contiguous. tiles: of the dkdv (or fused) and the dq kernel; by default from the tables."""
    dtype = q.dtype
    q, k, v, do, o = loadable(q, k, v, do, o)
    switched = flags(options, cu_seqlens)
    first = "dkdv" if options.deterministic else "fused"
    described = describable(q, k, v, do)
    dkdv, rows = tiles or (tile_for_device(kind, q, switched, described) for kind in (first, "dq"))
    starts, ends = document_bounds(cu_seqlens, q.shape[0], k.shape[1])
    inputs, saved = (q, k, v, do), (lse, delta_of(do, o.contiguous(), dlse))
    dq, dk, dv = (torch.empty(t.shape, dtype=q.dtype, device=q.device) for t in (q, k, v))
    if options.deterministic:
        launch_dkdv(inputs, saved, samples, ends, (None, dk, dv), options, switched, dkdv)
        launch_dq(inputs, saved, samples, starts, dq, options, switched, rows)
    else:
        sums = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        launch_dkdv(inputs, saved, samples, ends, (sums, dk, dv), options, switched, dkdv)
        launch(
            scale_and_cast_kernel, cdiv(sums.numel(), CAST_ELEMENTS), q.device,
            sums, dq, sums.numel(), 1 / math.sqrt(q.shape[3]), CAST_ELEMENTS,
        )  # fmt: skip
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)
