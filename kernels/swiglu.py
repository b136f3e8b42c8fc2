"""SwiGLU's product (Shazeer 2020), silu(gate) * up, forward and backward in one kernel each.

M rows (all leading dimensions together), F width of the result; x has 2 F channels. With s = sigmoid(gate):
    y = gate s up;  dgate = dy up s (1 + gate (1 - s));  dup = dy gate s
The backward pass computes s again, so only x is kept. Gate and up are the even and odd channels, so a contiguous tensor
is one row of M F pairs, loaded in full 16-byte vectors.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import (
    KernelError,
    cdiv,
    choose,
    empty_like,
    interpretable,
    last_contiguous,
    padded,
    rounded,
    wide,
)
from kernels.plan import Plan, planned
from kernels.registration import call, operator

TILE_ELEMENTS = 2048  # of the result
TILE_WIDTH = 512  # of tiles with rows; narrow, so that little of the last one lies beyond the row


def tile_of(M: int, width: int) -> tuple[int, int]:
    """Return (rows, columns) of a tile of the result [M, width]; of a flattened tensor (M = 1) whatever its width."""
    columns = TILE_ELEMENTS if M == 1 else min(TILE_WIDTH, padded(width))
    return TILE_ELEMENTS // columns, columns


@triton.jit
def sigmoids(x):
    """sigmoid(x) and 1 - sigmoid(x), each to the last bits: the difference would lose them where x is large."""
    t = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + t)
    small = t * large
    return tl.where(x < 0, small, large), tl.where(x < 0, large, small)


@triton.jit
def load_pair(x_rows, first, width, rows_inside, ROWS: tl.constexpr, COLS: tl.constexpr):
    """gate and up, fp32 [ROWS, COLS], of the columns from `first`. x_rows: pointers to the rows [ROWS, 1]."""
    pairs = first * 2 + tl.arange(0, 2 * COLS)[None, :]
    x = tl.load(x_rows + pairs, rows_inside & (pairs < 2 * width)).to(tl.float32)
    return tl.split(x.reshape(ROWS, COLS, 2))


@triton.jit
def tile_place(stride_y, M, ROWS: tl.constexpr, COLS: tl.constexpr, VECTOR: tl.constexpr):
    """This program's rows [ROWS, 1] and which exist, first column, columns [1, COLS], and F, all int64."""
    width = tl.cast(stride_y, tl.int64)  # of a flattened tensor: twice it may pass 2^31
    tiles = tl.cdiv(width, COLS)
    rows = ((tl.program_id(0) // tiles) * ROWS + tl.arange(0, ROWS))[:, None]
    first = (tl.program_id(0) % tiles) * COLS
    # A thread that loads 16 bytes of pairs holds half as many results. Told that no more of them lie together, the
    # compiler leaves them with their thread instead of passing them around through shared memory.
    cols = tl.max_contiguous(first + tl.arange(0, COLS), VECTOR)[None, :]
    return rows, rows < M, first, cols, width


@triton.jit(do_not_specialize=["M"])
def swiglu_forward_kernel(
    x_ptr, y_ptr, stride_x, stride_y, M, ROWS: tl.constexpr, COLS: tl.constexpr, VECTOR: tl.constexpr
):  # fmt: skip
    """One tile: x [M, 2 F] with row stride stride_x -> y [M, F] contiguous, F = stride_y."""
    # Triton types a call from one kernel to another as if it were made from the host.
    rows, rows_inside, first, cols, width = tile_place(  # pyright: ignore[reportGeneralTypeIssues]
        stride_y, M, ROWS, COLS, VECTOR
    )
    gate, up = load_pair(  # pyright: ignore[reportGeneralTypeIssues]
        x_ptr + rows * stride_x, first, width, rows_inside, ROWS, COLS
    )
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + rows * stride_y + cols, y.to(y_ptr.dtype.element_ty), rows_inside & (cols < width))


@triton.jit(do_not_specialize=["M"])
def swiglu_backward_kernel(
    dy_ptr, x_ptr, dx_ptr, stride_dy, stride_x, stride_y, M,
    ROWS: tl.constexpr, COLS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One tile: dy [M, F] and x [M, 2 F] with their row strides -> dx [M, 2 F] contiguous, F = stride_y."""
    rows, rows_inside, first, cols, width = tile_place(  # pyright: ignore[reportGeneralTypeIssues]
        stride_y, M, ROWS, COLS, VECTOR
    )
    gate, up = load_pair(  # pyright: ignore[reportGeneralTypeIssues]
        x_ptr + rows * stride_x, first, width, rows_inside, ROWS, COLS
    )
    dy = tl.load(dy_ptr + rows * stride_dy + cols, rows_inside & (cols < width)).to(tl.float32)
    s, rest = sigmoids(gate)  # pyright: ignore[reportGeneralTypeIssues]
    dgate = (dy * up * s * (1.0 + gate * rest)).to(dx_ptr.dtype.element_ty)
    dup = (dy * gate * s).to(dx_ptr.dtype.element_ty)
    pairs = first * 2 + tl.arange(0, 2 * COLS)[None, :]
    dx = tl.join(dgate, dup).reshape(ROWS, 2 * COLS)
    tl.store(dx_ptr + rows * (2 * width) + pairs, dx, rows_inside & (pairs < 2 * width))


def as_matrices(*tensors: Tensor) -> tuple[tuple[Tensor, ...], int, tuple[int, ...]]:
    """(tensors with contiguous rows, how many rows, the strides of the rows); one row if all tensors are contiguous."""
    if all(t.is_contiguous() for t in tensors):
        return interpretable(*tensors), 1, (0,) * len(tensors)
    rows = interpretable(*(last_contiguous(t.reshape(-1, t.shape[-1])) for t in tensors))
    return rows, rows[0].shape[0], tuple([t.stride(0) for t in rows])


def plan_of(
    kernel: Any, pairs: bool, M: int, width: int, strides: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Plan:
    """`kernel` over a result [M, width], from inputs with these strides of rows. pairs: it takes VECTOR."""
    ROWS, COLS = tile_of(M, width)
    vector = [8 // dtype.itemsize] * pairs  # results that a thread holds after loading 16 bytes of pairs
    return Plan(kernel, cdiv(M, ROWS) * cdiv(width, COLS), device, *strides, width, M, ROWS, COLS, *vector)


forward_plan = planned(partial(plan_of, swiglu_forward_kernel, True))
backward_plan = planned(partial(plan_of, swiglu_backward_kernel, True))


@operator("swiglu_backward", fake=lambda dy, x: x.new_empty(x.shape))
def swiglu_backward_op(dy: Tensor, x: Tensor) -> Tensor:
    """dy [..., F], x [..., 2 F] -> dx [..., 2 F]."""
    (dy_rows, rows), M, strides = as_matrices(dy, x)
    dx = empty_like(x, rows.dtype)
    backward_plan(M, dy.numel() // M, strides, rows.dtype, x.device)(dy_rows, rows, dx)
    return rounded(dx, x.dtype)


def _backward(ctx, dy):
    return call(swiglu_backward_op, dy, *ctx.saved_tensors)


@operator("swiglu", fake=lambda x: x.new_empty(*x.shape[:-1], x.shape[-1] // 2), backward=_backward)
def swiglu_op(x: Tensor) -> Tensor:
    """x [..., 2 F] -> [..., F]."""
    (rows,), M, strides = as_matrices(x)
    y = rows.new_empty((*x.shape[:-1], x.shape[-1] // 2))
    forward_plan(M, y.numel() // M, strides, rows.dtype, x.device)(rows, y)
    return rounded(y, x.dtype)


def stock(x: Tensor) -> Tensor:
    """PyTorch's own operators."""
    gate, up = x.unflatten(-1, (-1, 2)).unbind(-1)
    return F.silu(gate.contiguous()) * up  # contiguous: twice as fast on a CPU


def swiglu_reference(x: Tensor) -> Tensor:
    """gate * sigmoid(gate) * up; x [..., 2 F] -> [..., F]."""
    gate, up = wide(x)[..., 0::2], wide(x)[..., 1::2]
    return (gate * torch.sigmoid(gate) * up).to(x.dtype)


def swiglu(x: Tensor, *, impl: str = "auto") -> Tensor:
    """silu(gate) * up (Shazeer 2020, eq. 6, without its matrix products).

    x [..., 2 F] with any strides; gate and up are its even and odd channels, so that any even cut of the channels is a
    shard. A last dimension that is not contiguous, and leading dimensions that do not merge into one stride, cost a
    copy. Returns [..., F] in the dtype of x; fp32 inside. Differentiable once. impl: see kernels/dispatch.py. Raises
    KernelError on an odd or empty last dimension or a form that cannot run.
    """
    width = x.shape[-1] if x.dim() else 0
    if width == 0 or width % 2:
        found = f"found x {tuple(x.shape)}"
        raise KernelError(f"swiglu: {found}, expected [..., 2 F]: a gate and an up channel for each of F results")
    form = choose(impl, "swiglu", device=x.device, dtype=x.dtype)
    if form == "triton":
        return call(swiglu_op, x)
    return swiglu_reference(x) if form == "reference" else stock(x)
