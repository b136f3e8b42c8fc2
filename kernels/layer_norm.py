"""Layer normalisation (Ba et al. 2016), forward and backward, with statistics in fp32.

M rows (all leading dimensions together), C width. The backward of a row, with xhat = (x - mean) *
rstd and g = dy * weight:
    dx = rstd * (g - mean(g) - xhat * mean(g * xhat));  dweight = sum over rows of dy * xhat;  dbias
    = sum of dy
Each program of the backward owns a fixed range of rows and writes one partial row of dweight and
dbias, which are then
summed in a fixed order: no atomics, no locks, the same bits on every run and every GPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.dispatch import cdiv, choose, expect, interpretable, launch, padded

# Programs of the backward, and so partial rows. About two per SM of a large GPU; a constant, not
# the SM count, so that the sums do not depend on the GPU.
PARTIALS = 256
MAX_WIDTH = 8192  # one tile holds a row
TILE_ELEMENTS = 4096  # rows narrower than this share a tile


def tile_of(C: int) -> tuple[int, int, int]:
    """(rows of a tile, its padded width, warps) for rows of width C."""
    width = padded(C)
    rows = max(1, min(16, TILE_ELEMENTS // width))
    return rows, width, max(4, width // 1024)


@triton.jit
def layer_norm_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, stride_x, M, eps,
    C: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """One tile of rows: x [M, C] with row stride stride_x -> y [M, C] contiguous, mean and rstd
    fp32 [M].
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, WIDTH)
    inside = (rows < M)[:, None] & (cols < C)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_x + cols[None, :], inside, 0.0).to(tl.float32)
    mean = tl.sum(x, 1) / C
    # The padding must not count as (0 - mean)^2.
    centred = tl.where(cols[None, :] < C, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 1) / C + eps)
    weight = tl.load(weight_ptr + cols, cols < C, 0.0).to(tl.float32)
    y = centred * rstd[:, None] * weight[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, cols < C, 0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + rows[:, None] * C + cols[None, :], y.to(y_ptr.dtype.element_ty), inside)
    tl.store(mean_ptr + rows, mean, rows < M)
    tl.store(rstd_ptr + rows, rstd, rows < M)


@triton.jit
def layer_norm_backward_kernel(
    dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    stride_dy, stride_x, M, rows_per_program,
    C: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """dx [M, C] contiguous of this program's rows, and its row of the partial sums dweight, dbias
    fp32 [programs, C].
    """
    program = tl.program_id(0).to(tl.int64)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, M)
    cols = tl.arange(0, WIDTH)
    weight = tl.load(weight_ptr + cols, cols < C, 0.0).to(tl.float32)
    dweight = tl.zeros((WIDTH,), tl.float32)
    dbias = tl.zeros((WIDTH,), tl.float32)
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows < last)[:, None] & (cols < C)[None, :]
        x = tl.load(x_ptr + rows[:, None] * stride_x + cols[None, :], inside, 0.0).to(tl.float32)
        dy = tl.load(dy_ptr + rows[:, None] * stride_dy + cols[None, :], inside, 0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, rows < last, 0.0)
        rstd = tl.load(rstd_ptr + rows, rows < last, 0.0)
        xhat = tl.where(inside, (x - mean[:, None]) * rstd[:, None], 0.0)
        g = dy * weight[None, :]
        projection = tl.sum(g * xhat, 1) / C
        dx = (g - (tl.sum(g, 1) / C)[:, None] - xhat * projection[:, None]) * rstd[:, None]
        tl.store(dx_ptr + rows[:, None] * C + cols[None, :], dx.to(dx_ptr.dtype.element_ty), inside)
        dweight += tl.sum(dy * xhat, 0)
        if HAS_BIAS:
            dbias += tl.sum(dy, 0)
    tl.store(dweight_ptr + program * C + cols, dweight, cols < C)
    if HAS_BIAS:
        tl.store(dbias_ptr + program * C + cols, dbias, cols < C)


def as_rows(x: Tensor) -> Tensor:
    """x [..., C] as [M, C] with the last dimension contiguous; copies only where strides force it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


@torch.library.custom_op("ingot::layer_norm", mutates_args=())
def layer_norm_op(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y [..., C] in the dtype of x, mean fp32 [M], rstd fp32 [M])."""
    (rows,) = interpretable(as_rows(x))
    (weight,) = interpretable(weight.contiguous())
    if bias is not None:
        (bias,) = interpretable(bias.contiguous())
    M, C = rows.shape
    y = torch.empty((M, C), dtype=rows.dtype, device=x.device)
    mean = torch.empty(M, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    ROWS, WIDTH, num_warps = tile_of(C)
    launch(
        layer_norm_forward_kernel, cdiv(M, ROWS), x.device,
        rows, weight, bias, y, mean, rstd, rows.stride(0), M, eps,
        C, ROWS, WIDTH, bias is not None, warps=num_warps,
    )  # fmt: skip
    return y.to(x.dtype).view(x.shape), mean, rstd


@layer_norm_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), mean, torch.empty_like(mean)


@torch.library.custom_op("ingot::layer_norm_backward", mutates_args=())
def layer_norm_backward_op(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx [..., C] in the dtype of x, dweight [C] and dbias [C], [0] without a bias, in weight's)."""
    dy_rows, rows = interpretable(as_rows(dy), as_rows(x))
    (wide_weight,) = interpretable(weight.contiguous())
    M, C = rows.shape
    ROWS, WIDTH, num_warps = tile_of(C)
    programs = max(1, min(PARTIALS, cdiv(M, ROWS)))
    dx = torch.empty((M, C), dtype=rows.dtype, device=x.device)
    dweight = torch.empty((programs, C), dtype=torch.float32, device=x.device)
    dbias = torch.empty((programs if has_bias else 0, C), dtype=torch.float32, device=x.device)
    rows_per_program = cdiv(cdiv(M, ROWS), programs) * ROWS
    launch(
        layer_norm_backward_kernel, programs, x.device,
        dy_rows, rows, wide_weight, mean, rstd, dx, dweight, dbias,
        dy_rows.stride(0), rows.stride(0), M, rows_per_program,
        C, ROWS, WIDTH, has_bias, warps=num_warps,
    )  # fmt: skip
    bias_gradient = dbias.sum(0) if has_bias else dbias.new_empty(0)
    return (
        dx.to(x.dtype).view(x.shape),
        dweight.sum(0).to(weight.dtype),
        bias_gradient.to(weight.dtype),
    )


@layer_norm_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, torch.empty_like(weight), weight.new_empty(weight.shape[0] if has_bias else 0)


def _save(ctx, inputs, output) -> None:
    x, weight, bias, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, dy, dmean, drstd):
    if dy is None:
        return None, None, None, None
    x, weight, mean, rstd = ctx.saved_tensors
    has_bias = ctx.bias_dtype is not None
    dx, dweight, dbias = torch.ops.ingot.layer_norm_backward(dy, x, weight, mean, rstd, has_bias)
    return dx, dweight, dbias.to(ctx.bias_dtype) if has_bias else None, None


layer_norm_op.register_autograd(_backward, setup_context=_save)


def too_wide(C: int) -> str | None:
    """Why rows of width C have no Triton form, or None if they have."""
    if C <= MAX_WIDTH:
        return None
    return f"found width {C}, expected at most {MAX_WIDTH}: use impl=torch or reference"


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5, *, impl: str = "auto") -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension, in fp32.

    x [..., C] with any strides; weight, bias [C]; bias may be None. Returns [..., C] in the dtype
    of x. Differentiable once. impl: see kernels/dispatch.py. Raises KernelError on wrong shapes or
    a form that cannot run.
    """
    C = x.shape[-1]
    shapes = [tuple(t.shape) for t in (weight, bias) if t is not None]
    expect(
        all(s == (C,) for s in shapes),
        f"layer_norm: found weight and bias of shapes {shapes}, expected ({C},), the last of x",
    )
    form = choose(impl, "layer_norm", device=x.device, dtype=x.dtype, no_triton=too_wide(C))
    if form == "triton":
        return layer_norm_op(x, weight, bias, eps)[0]
    if form == "reference":
        return reference.layer_norm(x, weight, bias, eps)
    stock = [None if t is None else t.to(x.dtype) for t in (weight, bias)]
    return F.layer_norm(x, (C,), stock[0], stock[1], eps)
