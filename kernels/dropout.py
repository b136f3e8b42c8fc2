"""Dropout by counters (kernels/philox.py) in one pass, which also adds the residual stream if there is one."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import philox
from kernels.dispatch import KernelError, cdiv, choose, empty_like, readable, rounded
from kernels.philox import DropoutKey, keep_tile
from kernels.plan import Plan, planned
from kernels.registration import call, operator

ROWS, COLS = 4, 512


@triton.jit(do_not_specialize=["seed", "site", "threshold", "T"])
def dropout_kernel(
    x_ptr, residual_ptr, samples_ptr, positions_ptr, out_ptr, keep_scale, seed, site, threshold,
    stride_xb, stride_xt, stride_rb, stride_rt, T,
    C: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """One tile of out [B, T, C] contiguous = x where kept, over 1 - p, (+ residual)."""
    col_tiles = tl.cdiv(C, COLS)
    row_tiles = tl.cdiv(T, ROWS)
    first_col = tl.program_id(0) % col_tiles * COLS
    rows = tl.program_id(0) // col_tiles % row_tiles * ROWS + tl.arange(0, ROWS)
    b = (tl.program_id(0) // col_tiles // row_tiles).to(tl.int64)
    cols = first_col + tl.arange(0, COLS)
    inside = (rows < T)[:, None] & (cols < C)[None, :]
    positions = tl.load(positions_ptr + rows, rows < T, 0).to(tl.int32)
    sample = tl.load(samples_ptr + b)
    rows = rows.to(tl.int64)
    x = tl.load(x_ptr + b * stride_xb + rows[:, None] * stride_xt + cols[None, :], inside, 0.0).to(tl.float32)
    keep = keep_tile(seed, site, threshold, sample, tl.zeros((), tl.int32), positions, first_col, COLS)
    # Scaled before the choice, which keeps product and sum apart: an FMA would round once where PyTorch rounds twice.
    out = tl.where(keep, x * keep_scale, 0.0)
    if HAS_RESIDUAL:
        at = residual_ptr + b * stride_rb + rows[:, None] * stride_rt + cols[None, :]
        out += tl.load(at, inside, 0.0).to(tl.float32)
    tl.store(out_ptr + (b * T + rows[:, None]) * C + cols[None, :], out.to(out_ptr.dtype.element_ty), inside)


@planned
def plan_of(
    shape: torch.Size, x_strides: tuple[int, ...], residual_strides: tuple[int, ...] | None, dtype: torch.dtype,
    device: torch.device,
) -> Plan:  # fmt: skip
    B, T, C = shape
    strides = *x_strides[:2], *(residual_strides or (0, 0))[:2]
    programs = cdiv(C, COLS) * cdiv(T, ROWS) * B
    return Plan(dropout_kernel, programs, device, *strides, T, C, ROWS, COLS, residual_strides is not None)


def _save(ctx, inputs, output) -> None:
    _, residual, samples, positions, *ctx.key = inputs
    ctx.has_residual = residual is not None
    ctx.save_for_backward(samples, positions)


def _backward(ctx, grad):
    # The mask is symmetric: the gradient passes through the same operation.
    grad_x = call(dropout_op, grad, None, *ctx.saved_tensors, *ctx.key)
    return grad_x, grad if ctx.has_residual else None


@operator("dropout", fake=lambda x, *_: empty_like(x), save=_save, backward=_backward)
def dropout_op(
    x: Tensor, residual: Tensor | None, samples: Tensor, positions: Tensor, p: float, seed: int, site: int
) -> Tensor:
    """[B, T, C] in the dtype of x."""
    rows, added = readable(x, residual)
    out = empty_like(x, rows.dtype)
    plan = plan_of(x.shape, rows.stride(), None if added is None else added.stride(), rows.dtype, x.device)
    plan(rows, added, samples, positions.contiguous(), out, numbers=DropoutKey(p, seed, site).numbers)
    return rounded(out, x.dtype)


def dropout(
    x: Tensor, key: DropoutKey, samples: Tensor, positions: Tensor, *, residual: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:  # fmt: skip
    """residual + (x / (1 - p) where kept, else 0) (Srivastava et al. 2014).

    x [B, T, C]; residual the same shape and dtype, or None; samples int64 [B], global sample numbers; positions int64
    [T]. The mask is that of `kernels.philox.keep_mask` with rows = positions, columns = channels. Returns [B, T, C];
    with p = 0 the sum, or x itself. The triton form rounds once, torch and reference (which are the same) after each
    operation. impl: see kernels/dispatch.py. Raises KernelError on arguments that do not fit together or a form that
    cannot run.
    """
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        expected = f"{tuple(x.shape)} of {x.dtype}"
        raise KernelError(f"dropout: found a residual that is not {expected}, as x is: cast or reshape it")
    form = choose(impl, "dropout", device=x.device, dtype=x.dtype)
    if form == "triton" and key.p > 0:
        return dropout_op(x, residual, samples, positions, key.p, key.seed, key.site)
    dropped = philox.dropout(x, key, samples, positions)
    return dropped if residual is None else residual + dropped
