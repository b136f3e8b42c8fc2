"""The backward pass of the norms.

With xhat = (x - mean) * rstd and g = dy * weight, for each row
    dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), without mean(g) for RMS norm
    dweight = sum over rows of dy * xhat;  dbias = sum of dy
With a residual, x is the stream. Its own gradient dstream is added to dx, which gives dresidual. With dropout the
gradient of the dropped tensor is dropout(dresidual) by the same mask.

Each program owns a fixed range of rows and writes one partial row of dweight and dbias; the partial rows are summed in
a fixed order. No atomics, no locks: the same bits on every run and every GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import cdiv, empty_like, readable, rounded
from kernels.norm.forward import drop_arguments
from kernels.norm.tiles import MEAN_COLS, column_blocks, rows_of
from kernels.philox import keep_tile
from kernels.plan import Plan, planned

# Programs. About two per SM of a large GPU; a constant, not the SM count, so that the sums do not depend on the GPU.
PROGRAMS = 256
SUM_ROWS, SUM_COLS = 64, 32


@triton.jit
def load_gradient(dy_ptr, x_ptr, dy_at, x_at, mean, rstd, weight, exists, cols, C: tl.constexpr):
    """(dy, xhat, g), fp32 tiles [rows, cols]; dy and g are zero outside."""
    inside = exists[:, None] & (cols < C)[None, :]
    x = tl.load(x_ptr + x_at[:, None] + cols[None, :], inside, 0.0).to(tl.float32)
    dy = tl.load(dy_ptr + dy_at[:, None] + cols[None, :], inside, 0.0).to(tl.float32)
    return dy, (x - mean[:, None]) * rstd[:, None], dy * weight[None, :]


@triton.jit(do_not_specialize=["M", "T"])
def projections_kernel(
    dy_ptr, x_ptr, weight_ptr, statistics_ptr, projections_ptr, stride_yb, stride_yt, stride_xb, stride_xt, M, T,
    C: tl.constexpr, COLS: tl.constexpr, RMS: tl.constexpr,
):  # fmt: skip
    """mean(g) and mean(g * xhat) of one row -> fp32 [2, M]."""
    rows = tl.program_id(0) + tl.arange(0, 1)
    exists = rows < M
    b, t = (rows // T).to(tl.int64), (rows % T).to(tl.int64)
    rstd = tl.load(statistics_ptr + rows)
    mean = tl.zeros((1,), tl.float32) if RMS else tl.load(statistics_ptr + M + rows)
    sums = tl.zeros((1, COLS), tl.float32)
    products = tl.zeros((1, COLS), tl.float32)
    for start in tl.range(0, C, COLS):
        cols = start + tl.arange(0, COLS)
        weight = tl.load(weight_ptr + cols, cols < C, 0.0).to(tl.float32)
        _, xhat, g = load_gradient(
            dy_ptr, x_ptr, b * stride_yb + t * stride_yt, b * stride_xb + t * stride_xt, mean, rstd, weight, exists,
            cols, C,
        )  # fmt: skip
        sums += g
        products += g * xhat
    mean_g = tl.zeros((1,), tl.float32) if RMS else tl.sum(sums, 1) / C
    tl.store(projections_ptr + rows, mean_g)
    tl.store(projections_ptr + M + rows, tl.sum(products, 1) / C)


@triton.jit
def load_weights(
    weight_ptr, cols, C: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, CHUNKS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """(weights, zeros to sum dweight in, zeros for dbias), by chunk."""
    weights = ()
    dweights = ()
    dbiases = ()
    for c in tl.static_range(CHUNKS):  # pyright: ignore[reportGeneralTypeIssues]
        at = cols + c * COLS
        weights += (tl.load(weight_ptr + at, at < C, 0.0).to(tl.float32),)
        dweights += (tl.zeros((ROWS, COLS), tl.float32),)
        if HAS_BIAS:
            dbiases += (tl.zeros((ROWS, COLS), tl.float32),)
    return weights, dweights, dbiases


@triton.jit
def load_gradients(
    dy_ptr, x_ptr, dy_at, x_at, mean, rstd, weights, exists, cols, dweights, dbiases,
    C: tl.constexpr, COLS: tl.constexpr, CHUNKS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """(xhat, g, dweight so far, dbias so far), by chunk."""
    xhats = ()
    gs = ()
    new_dweights = ()
    new_dbiases = ()
    for c in tl.static_range(CHUNKS):  # pyright: ignore[reportGeneralTypeIssues]
        at = cols + c * COLS
        dy, xhat, g = load_gradient(  # pyright: ignore[reportGeneralTypeIssues]
            dy_ptr, x_ptr, dy_at, x_at, mean, rstd, weights[c], exists, at, C
        )
        xhats += (xhat,)
        gs += (g,)
        new_dweights += (dweights[c] + dy * xhat,)
        if HAS_BIAS:
            new_dbiases += (dbiases[c] + dy,)
    return xhats, gs, new_dweights, new_dbiases


@triton.jit
def projections_of(xhats, gs, C: tl.constexpr, CHUNKS: tl.constexpr, RMS: tl.constexpr):
    """(mean(g), 0 for RMS norm; mean(g * xhat)) of whole rows held by chunk."""
    products = gs[0] * xhats[0]
    sums = gs[0]
    for c in tl.static_range(1, CHUNKS):  # pyright: ignore[reportGeneralTypeIssues]
        products += gs[c] * xhats[c]
        sums += gs[c]
    projection = tl.sum(products, 1) / C
    mean_g = tl.zeros_like(projection) if RMS else tl.sum(sums, 1) / C
    return mean_g, projection


@triton.jit
def store_gradient(
    dx, dstream_ptr, dresidual_ptr, dx_ptr, samples_ptr, positions_ptr, dstream_at, row_at, b, t, exists, first_col,
    keep_scale, seed, site, threshold,
    C: tl.constexpr, COLS: tl.constexpr, HAS_DSTREAM: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """One tile of dresidual = dx + dstream, and of its dropout."""
    cols = first_col + tl.arange(0, COLS)
    inside = exists[:, None] & (cols < C)[None, :]
    if HAS_DSTREAM:
        dx += tl.load(dstream_ptr + dstream_at[:, None] + cols[None, :], inside, 0.0).to(tl.float32)
    tl.store(dresidual_ptr + row_at[:, None] + cols[None, :], dx.to(dresidual_ptr.dtype.element_ty), inside)
    if DROPOUT:
        sample = tl.load(samples_ptr + b, exists, 0)[:, None]
        position = tl.load(positions_ptr + t, exists, 0).to(tl.int32)
        keep = keep_tile(seed, site, threshold, sample, tl.zeros((), tl.int32), position, first_col, COLS)
        dx = tl.where(keep, dx * keep_scale, 0.0)
        tl.store(dx_ptr + row_at[:, None] + cols[None, :], dx.to(dx_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["M", "T", "rows_per_program", "row_programs", "seed", "site", "threshold"])
def norm_backward_kernel(
    dy_ptr, dstream_ptr, x_ptr, weight_ptr, statistics_ptr, projections_ptr, samples_ptr, positions_ptr,
    dresidual_ptr, dx_ptr, partials_ptr, keep_scale, seed, site, threshold,
    stride_yb, stride_yt, stride_sb, stride_st, stride_xb, stride_xt, M, T, rows_per_program, row_programs,
    C: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, CHUNKS: tl.constexpr, RMS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_DSTREAM: tl.constexpr, DROPOUT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dresidual and dx [M, C] contiguous of this program's rows, and its row of the partial sums dweight (, dbias),
    fp32 [row_programs, 1 or 2, C]. WIDE: of a block of columns only, with the projections given.
    """
    program = tl.program_id(0) % row_programs
    block = tl.program_id(0) // row_programs * (COLS * CHUNKS)
    cols = block + tl.arange(0, COLS)
    weights, dweights, dbiases = load_weights(  # pyright: ignore[reportGeneralTypeIssues]
        weight_ptr, cols, C, ROWS, COLS, CHUNKS, HAS_BIAS
    )
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, M)
    for start in tl.range(first, last, ROWS, num_stages=2):
        rows = start + tl.arange(0, ROWS)
        exists = rows < last
        b, t = (rows // T).to(tl.int64), (rows % T).to(tl.int64)
        rstd = tl.load(statistics_ptr + rows, exists, 0.0)
        mean = tl.zeros((ROWS,), tl.float32) if RMS else tl.load(statistics_ptr + M + rows, exists, 0.0)
        xhats, gs, dweights, dbiases = load_gradients(
            dy_ptr, x_ptr, b * stride_yb + t * stride_yt, b * stride_xb + t * stride_xt, mean, rstd, weights, exists,
            cols, dweights, dbiases, C, COLS, CHUNKS, HAS_BIAS,
        )  # fmt: skip
        if WIDE:
            mean_g = tl.load(projections_ptr + rows, exists, 0.0)
            projection = tl.load(projections_ptr + M + rows, exists, 0.0)
        else:
            mean_g, projection = projections_of(  # pyright: ignore[reportGeneralTypeIssues]
                xhats, gs, C, CHUNKS, RMS
            )
        for c in tl.static_range(CHUNKS):  # pyright: ignore[reportGeneralTypeIssues]
            dx = (gs[c] - mean_g[:, None] - xhats[c] * projection[:, None]) * rstd[:, None]
            store_gradient(
                dx, dstream_ptr, dresidual_ptr, dx_ptr, samples_ptr, positions_ptr, b * stride_sb + t * stride_st,
                rows.to(tl.int64) * C, b, t, exists, block + c * COLS, keep_scale, seed, site, threshold,
                C, COLS, HAS_DSTREAM, DROPOUT,
            )  # fmt: skip
    at = partials_ptr + program.to(tl.int64) * (C * (1 + HAS_BIAS)) + cols
    for c in tl.static_range(CHUNKS):  # pyright: ignore[reportGeneralTypeIssues]
        tl.store(at + c * COLS, tl.sum(dweights[c], 0), cols + c * COLS < C)
        if HAS_BIAS:
            tl.store(at + C + c * COLS, tl.sum(dbiases[c], 0), cols + c * COLS < C)


@triton.jit(do_not_specialize=["P"])
def sum_partials_kernel(
    partials_ptr, dweight_ptr, dbias_ptr, P, C: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """partials fp32 [P, 1 or 2, C] -> COLS columns of dweight (, dbias) [C]: their sums over P, in a fixed order."""
    N: tl.constexpr = C * (1 + HAS_BIAS)
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in tl.range(0, P, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows < P)[:, None] & (cols < N)[None, :]
        total += tl.load(partials_ptr + rows[:, None].to(tl.int64) * N + cols[None, :], inside, 0.0)
    sums = tl.sum(total, 0).to(dweight_ptr.dtype.element_ty)
    tl.store(dweight_ptr + cols, sums, cols < C)
    if HAS_BIAS:
        tl.store(dbias_ptr + cols - C, sums, (cols >= C) & (cols < N))


@planned
def plans_of(
    shape: torch.Size, dy_strides: tuple[int, ...], dstream_strides: tuple[int, ...], x_strides: tuple[int, ...],
    dtypes: tuple, has_bias: bool, rms: bool, dropout: bool, device: torch.device,
) -> tuple[Plan | None, Plan, Plan, int]:  # fmt: skip
    """(of the projections of rows too wide for registers, of the gradients, of their sums; rows of partial sums).

    dtypes: of dy, dstream (None if there is none), x and weight.
    """
    B, T, C = shape
    M = B * T
    (ROWS, COLS, CHUNKS, warps), blocks = column_blocks(C, dropout)
    tiles = cdiv(M, ROWS)
    partials = max(1, min(PROGRAMS // blocks, tiles))
    projections = None
    if blocks > 1:
        arguments = *dy_strides[:2], *x_strides[:2], M, T, C, MEAN_COLS, rms
        projections = Plan(projections_kernel, M, device, *arguments, warps=16)
    gradients = Plan(
        norm_backward_kernel, partials * blocks, device, *dy_strides[:2], *dstream_strides[:2], *x_strides[:2],
        M, T, cdiv(tiles, partials) * ROWS, partials,
        C, ROWS, COLS, CHUNKS, rms, has_bias, dtypes[1] is not None, dropout, blocks > 1, warps=warps,
    )  # fmt: skip
    programs = cdiv(C * (1 + has_bias), SUM_COLS)
    sums = Plan(sum_partials_kernel, programs, device, partials, C, SUM_ROWS, SUM_COLS, has_bias)
    return projections, gradients, sums, partials


def backward(
    dy: Tensor, dstream: Tensor | None, x: Tensor, weight: Tensor, statistics: Tensor,
    samples: Tensor | None, positions: Tensor | None,
    has_bias: bool, rms: bool, p: float, seed: int, site: int,
) -> list[Tensor]:  # fmt: skip
    """[dresidual, dweight, with a bias dbias, with dropout dx], from what was normalised, x."""
    drop, numbers = drop_arguments(samples, positions, p, seed, site)
    dy_rows, added, rows, wide_weight = readable(rows_of(dy), rows_of(dstream), rows_of(x), weight)
    project, differentiate, add, partial_rows = plans_of(
        rows.shape, dy_rows.stride(), (0, 0) if added is None else added.stride(), rows.stride(),
        (dy_rows.dtype, None if added is None else added.dtype, rows.dtype, wide_weight.dtype),
        has_bias, rms, samples is not None, x.device,
    )  # fmt: skip
    dresidual = empty_like(x, rows.dtype)
    dx = None if samples is None else empty_like(dresidual)
    partials = rows.new_empty(partial_rows, 1 + has_bias, rows.shape[2], dtype=torch.float32)
    dweights = [empty_like(wide_weight) for _ in range(1 + has_bias)]
    projections = None
    if project is not None:
        projections = rows.new_empty((2, statistics.shape[1]), dtype=torch.float32)
        project(dy_rows, rows, wide_weight, statistics, projections)
    differentiate(
        dy_rows, added, rows, wide_weight, statistics, projections, *drop, dresidual, dx, partials, numbers=numbers
    )
    add(partials, dweights[0], dweights[-1])
    found = [rounded(dresidual, x.dtype), *[rounded(each, weight.dtype) for each in dweights]]
    return found if dx is None else [*found, rounded(dx, x.dtype)]
