"""The forward pass of the norms: y = norm(x), or y = norm(stream) with stream = residual + dropout(x), also written.

M rows (all leading dimensions together, numbered b T + t), C width. Layer norm (Ba et al. 2016): y = (x - mean) * rstd
* weight + bias with rstd = 1 / sqrt(variance + eps). RMS norm (Zhang & Sennrich 2019): the same with mean 0 and no
bias. Statistics are fp32, and kept for the backward pass.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import cdiv, empty_like, readable, rounded, wide
from kernels.norm.tiles import forward_tile, rows_of
from kernels.philox import DropoutKey, keep_tile
from kernels.plan import Plan, planned


def drop_arguments(
    samples: Tensor | None, positions: Tensor | None, p: float, seed: int, site: int
) -> tuple[tuple[Tensor | None, ...], tuple[float, int, int, int]]:
    """((samples, positions), the key's numbers) as the kernels take them; without samples there is no dropout."""
    if samples is None or positions is None:
        return (None, None), (1.0, 0, 0, 0)
    return (samples.contiguous(), positions.contiguous()), DropoutKey(p, seed, site).numbers


@triton.jit
def load_stream(
    x_ptr, residual_ptr, stream_ptr, samples_ptr, positions_ptr, x_at, residual_at, row_at, b, t, exists, first_col,
    keep_scale, seed, site, threshold, C: tl.constexpr, COLS: tl.constexpr, ADD: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """The tile of what is normalised, fp32 [rows, COLS]: x, or the stream, which is stored and read as stored.

    x_at, residual_at, row_at: offsets of the rows in x, residual and contiguous tensors. b, t: their batch and time.
    """
    cols = first_col + tl.arange(0, COLS)
    inside = exists[:, None] & (cols < C)[None, :]
    x = tl.load(x_ptr + x_at[:, None] + cols[None, :], inside, 0.0).to(tl.float32)
    if ADD:
        if DROPOUT:
            sample = tl.load(samples_ptr + b, exists, 0)[:, None]
            position = tl.load(positions_ptr + t, exists, 0).to(tl.int32)
            keep = keep_tile(seed, site, threshold, sample, tl.zeros((), tl.int32), position, first_col, COLS)
            # Scaled before the choice, which keeps product and sum apart: PyTorch rounds both, an FMA would round once.
            x = tl.where(keep, x * keep_scale, 0.0)
        x += tl.load(residual_ptr + residual_at[:, None] + cols[None, :], inside, 0.0).to(tl.float32)
        stream = x.to(stream_ptr.dtype.element_ty)
        tl.store(stream_ptr + row_at[:, None] + cols[None, :], stream, inside)
        x = stream.to(tl.float32)
    return x


@triton.jit
def store_normalised(centred, rstd, weight_ptr, bias_ptr, y_ptr, row_at, exists, first_col,
                     C: tl.constexpr, COLS: tl.constexpr, HAS_BIAS: tl.constexpr):  # fmt: skip
    """One tile of y."""
    cols = first_col + tl.arange(0, COLS)
    y = centred * rstd[:, None] * tl.load(weight_ptr + cols, cols < C, 0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, cols < C, 0.0).to(tl.float32)[None, :]
    inside = exists[:, None] & (cols < C)[None, :]
    tl.store(y_ptr + row_at[:, None] + cols[None, :], y.to(y_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["M", "T", "seed", "site", "threshold"])
def norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, samples_ptr, positions_ptr, y_ptr, statistics_ptr, stream_ptr,
    keep_scale, seed, site, threshold, stride_xb, stride_xt, stride_rb, stride_rt, M, T, eps,
    C: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, CHUNKS: tl.constexpr,
    RMS: tl.constexpr, HAS_BIAS: tl.constexpr, ADD: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """ROWS rows, held in registers as CHUNKS chunks: y and the stream [M, C] contiguous, rstd and unless RMS the mean,
    fp32 [1 or 2, M].
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = rows < M
    b, t = (rows // T).to(tl.int64), (rows % T).to(tl.int64)
    row_at = rows.to(tl.int64) * C
    chunks = ()
    total = tl.zeros((ROWS, COLS), tl.float32)
    for c in tl.static_range(CHUNKS):  # pyright: ignore[reportGeneralTypeIssues]
        x = load_stream(
            x_ptr, residual_ptr, stream_ptr, samples_ptr, positions_ptr,
            b * stride_xb + t * stride_xt, b * stride_rb + t * stride_rt, row_at, b, t, exists, c * COLS,
            keep_scale, seed, site, threshold, C, COLS, ADD, DROPOUT,
        )  # fmt: skip
        chunks += (x,)
        total += x if not RMS else x * x
    if RMS:
        centred = chunks
        squares = total
    else:
        mean = tl.sum(total, 1) / C
        tl.store(statistics_ptr + M + rows, mean, exists)
        centred = ()
        squares = tl.zeros((ROWS, COLS), tl.float32)
        for c in tl.static_range(CHUNKS):  # pyright: ignore[reportGeneralTypeIssues]
            # The padding must not count as (0 - mean)^2.
            x = tl.where((c * COLS + tl.arange(0, COLS) < C)[None, :], chunks[c] - mean[:, None], 0.0)
            centred += (x,)
            squares += x * x
    rstd = 1.0 / tl.sqrt_rn(tl.sum(squares, 1) / C + eps)
    tl.store(statistics_ptr + rows, rstd, exists)
    for c in tl.static_range(CHUNKS):  # pyright: ignore[reportGeneralTypeIssues]
        store_normalised(centred[c], rstd, weight_ptr, bias_ptr, y_ptr, row_at, exists, c * COLS, C, COLS, HAS_BIAS)


@planned
def plan_of(
    shape: torch.Size, x_strides: tuple[int, ...], residual_strides: tuple[int, ...], dtypes: tuple, eps: float,
    rms: bool, dropout: bool, device: torch.device,
) -> Plan:  # fmt: skip
    """dtypes: of x, residual, weight and bias; None for what there is not."""
    (B, T, C), (_, residual, _, bias) = shape, dtypes
    ROWS, COLS, CHUNKS, warps = forward_tile(C, dropout)
    return Plan(
        norm_forward_kernel, cdiv(B * T, ROWS), device, *x_strides[:2], *residual_strides[:2], B * T, T, eps,
        C, ROWS, COLS, CHUNKS, rms, bias is not None, residual is not None, dropout, warps=warps,
    )  # fmt: skip


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None,
    samples: Tensor | None, positions: Tensor | None, eps: float, rms: bool, p: float, seed: int, site: int,
) -> list[Tensor]:  # fmt: skip
    """[y, rstd and unless rms the mean, fp32 [1 or 2, M], with residual the stream].

    samples, positions: of x's dropout, None without it; p, seed, site: its key.
    """
    rows, added, weight, bias = readable(rows_of(x), rows_of(residual), weight, bias)
    B, T, _ = rows.shape
    y = empty_like(x, rows.dtype if added is None else added.dtype)
    statistics = rows.new_empty(1 if rms else 2, B * T, dtype=torch.float32)
    stream = None if added is None else empty_like(y)
    drop, numbers = drop_arguments(samples, positions, p, seed, site)
    dtypes = rows.dtype, None if added is None else added.dtype, weight.dtype, None if bias is None else bias.dtype
    strides = (0, 0) if added is None else added.stride()
    plan = plan_of(rows.shape, rows.stride(), strides, dtypes, eps, rms, drop[0] is not None, x.device)
    plan(rows, added, weight, bias, *drop, y, statistics, stream, numbers=numbers)
    if residual is None or stream is None:
        return [rounded(y, x.dtype), statistics]
    return [rounded(y, residual.dtype), statistics, rounded(stream, residual.dtype)]


def norm_reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension; the mean is 0 if `rms`."""
    rows = wide(x)  # once: each cast would round its own part of the gradient
    centred = rows if rms else rows - rows.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * wide(weight)
    return (y if bias is None else y + wide(bias)).to(x.dtype)
