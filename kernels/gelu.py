"""gelu(x + bias), forward and backward: GELU by its tanh approximation (Hendrycks & Gimpel 2016; GPT-2's).

M rows (all leading dimensions together), F width. With z = x + bias and s = sigmoid(2 u),
u = sqrt(2 / pi) (z + 0.044715 z^3):
    y = z (1 + tanh(u)) / 2 = z s;  dx = dy (s + 2 z s (1 - s) du/dz);  dbias = sum over rows of dx
The backward computes s again: nothing but x is kept. For dbias each program owns a fixed range of rows and writes one
partial row, and the partial rows are summed in a fixed order: no atomics, the same bits on every run and every GPU.
Without a bias a contiguous x is one row.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import cdiv, choose, expect, interpretable, launch, wide
from kernels.registration import operator
from kernels.swiglu import as_matrices, sigmoids, tile_of

# Partial rows of dbias. With the column tiles of any width in use they fill a large GPU; a constant, not its SM count,
# so that the sums do not depend on the GPU.
PARTIALS = 128
TWICE_SLOPE: tl.constexpr = tl.constexpr(2 * math.sqrt(2 / math.pi))
CUBE: tl.constexpr = tl.constexpr(0.044715)


@triton.jit
def bias_tile(bias_ptr, cols, width, ROWS: tl.constexpr):
    """bias at `cols` [1, COLS], fp32 [ROWS, COLS]. Loaded once for every row, so that the threads that hold x hold
    their bias too, instead of passing one of the two through shared memory.
    """
    offsets = tl.zeros((ROWS, 1), tl.int32) + cols
    return tl.load(bias_ptr + offsets, offsets < width, 0.0).to(tl.float32)


@triton.jit(do_not_specialize=["M"])
def gelu_forward_kernel(
    x_ptr, bias_ptr, y_ptr, stride_x, stride_y, M,
    ROWS: tl.constexpr, COLS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """One tile: x [M, F] with row stride stride_x, bias [F] -> y [M, F] contiguous, F = stride_y."""
    tiles = tl.cdiv(tl.cast(stride_y, tl.int64), COLS)
    rows = ((tl.program_id(0) // tiles) * ROWS + tl.arange(0, ROWS))[:, None]
    cols = ((tl.program_id(0) % tiles) * COLS + tl.arange(0, COLS))[None, :]
    inside = (rows < M) & (cols < stride_y)
    z = tl.load(x_ptr + rows * stride_x + cols, inside).to(tl.float32)
    if HAS_BIAS:
        z += bias_tile(bias_ptr, cols, stride_y, ROWS)
    y = z * tl.sigmoid(z * TWICE_SLOPE * (1.0 + z * z * CUBE))
    tl.store(y_ptr + rows * stride_y + cols, y.to(y_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["M", "rows_per_program"])
def gelu_backward_kernel(
    dy_ptr, x_ptr, bias_ptr, dx_ptr, dbias_ptr, stride_dy, stride_x, stride_y, M, rows_per_program,
    ROWS: tl.constexpr, COLS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DBIAS: tl.constexpr,
):  # fmt: skip
    """dx [M, F] contiguous of this program's rows and columns, F = stride_y, and its part of its row of the partial
    sums dbias fp32 [programs per column tile, F].
    """
    tiles = tl.cdiv(tl.cast(stride_y, tl.int64), COLS)
    partial = tl.program_id(0) // tiles
    first = partial * rows_per_program
    last = tl.minimum(first + rows_per_program, M)
    cols = ((tl.program_id(0) % tiles) * COLS + tl.arange(0, COLS))[None, :]
    dbias = tl.zeros((ROWS, COLS), tl.float32)
    bias = bias_tile(bias_ptr, cols, stride_y, ROWS) if HAS_BIAS else 0.0
    for start in range(first, last, ROWS):
        rows = (start + tl.arange(0, ROWS))[:, None]
        inside = (rows < last) & (cols < stride_y)
        z = tl.load(x_ptr + rows * stride_x + cols, inside, 0.0).to(tl.float32) + bias
        dy = tl.load(dy_ptr + rows * stride_dy + cols, inside, 0.0).to(tl.float32)
        # Triton types a call from one kernel to another as if it were made from the host.
        s, rest = sigmoids(z * TWICE_SLOPE * (1.0 + z * z * CUBE))  # pyright: ignore[reportGeneralTypeIssues]
        slope = (1.0 + z * z * (3 * CUBE)) * TWICE_SLOPE
        dx = dy * s * (1.0 + z * rest * slope)
        tl.store(dx_ptr + rows * stride_y + cols, dx.to(dx_ptr.dtype.element_ty), inside)
        if HAS_DBIAS:
            dbias += dx  # rows beyond the last have dy = 0
    if HAS_DBIAS:
        sums = tl.sum(dbias, 0)[None, :]
        tl.store(dbias_ptr + partial * stride_y + cols, sums, cols < stride_y)


def _fake_backward(dy: Tensor, x: Tensor, bias: Tensor | None, want_dbias: bool) -> tuple[Tensor, Tensor]:
    dtype = x.dtype if bias is None else bias.dtype
    return x.new_empty(x.shape), x.new_empty(x.shape[-1] if want_dbias else 0, dtype=dtype)


@operator("bias_gelu_backward", fake=_fake_backward)
def bias_gelu_backward_op(dy: Tensor, x: Tensor, bias: Tensor | None, want_dbias: bool) -> tuple[Tensor, Tensor]:
    """(dx [..., F], dbias [F] in the dtype of bias; [0] unless wanted)."""
    dy_rows, rows = as_matrices(bias is None, dy, x)
    wide_bias = None if bias is None else interpretable(bias.contiguous())[0]
    M, width = rows.shape
    dx = torch.empty((M, width), dtype=rows.dtype, device=x.device)
    ROWS, COLS = tile_of(M, width)
    partials = min(PARTIALS, cdiv(M, ROWS)) if want_dbias else cdiv(M, ROWS)
    dbias = torch.empty((partials, width if want_dbias else 0), dtype=torch.float32, device=x.device)
    rows_per_program = cdiv(cdiv(M, ROWS), max(1, partials)) * ROWS
    launch(
        gelu_backward_kernel, partials * cdiv(width, COLS), x.device,
        dy_rows, rows, wide_bias, dx, dbias, dy_rows.stride(0), rows.stride(0), width, M, rows_per_program,
        ROWS, COLS, bias is not None, want_dbias,
    )  # fmt: skip
    return dx.to(x.dtype).view(x.shape), dbias.sum(0).to(x.dtype if bias is None else bias.dtype)


def _save(ctx, inputs, output) -> None:
    x, bias = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, bias)


def _backward(ctx, dy):
    if dy is None:
        return None, None
    x, bias = ctx.saved_tensors
    want_dbias = bias is not None and ctx.needs_input_grad[1]
    dx, dbias = bias_gelu_backward_op(dy, x, bias, want_dbias)
    return dx, dbias if want_dbias else None


@operator("bias_gelu", fake=lambda x, bias: x.new_empty(x.shape), save=_save, backward=_backward)
def bias_gelu_op(x: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., F], bias [F] -> [..., F]."""
    (rows,) = as_matrices(bias is None, x)
    if bias is not None:
        (bias,) = interpretable(bias.contiguous())
    M, width = rows.shape
    y = torch.empty((M, width), dtype=rows.dtype, device=x.device)
    ROWS, COLS = tile_of(M, width)
    launch(
        gelu_forward_kernel, cdiv(M, ROWS) * cdiv(width, COLS), x.device,
        rows, bias, y, rows.stride(0), width, M, ROWS, COLS, bias is not None,
    )  # fmt: skip
    return y.to(x.dtype).view(x.shape)


def gelu_reference(x: Tensor, bias: Tensor | None) -> Tensor:
    """0.5 z (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3))) with z = x + bias; x [..., F], bias [F] or None."""
    z = wide(x) if bias is None else wide(x) + wide(bias)
    return (0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))).to(x.dtype)


def bias_gelu(x: Tensor, bias: Tensor | None, *, impl: str = "auto") -> Tensor:
    """z Phi(z) for z = x + bias, as 0.5 z (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3))) (Hendrycks & Gimpel 2016, sec. 2).

    x [..., F] with any strides; bias [F] in any dtype, or None. A last dimension that is not contiguous, and leading
    dimensions that do not merge into one stride, cost a copy. Returns [..., F] in the dtype of x; fp32 inside, with the
    bias added in fp32. Differentiable once. impl: see kernels/dispatch.py. Raises KernelError on a bias of another
    shape, an empty last dimension or a form that cannot run.
    """
    width = x.shape[-1] if x.dim() else 0
    expect(width > 0, f"bias_gelu: found x {tuple(x.shape)}, expected [..., F] with F at least 1")
    expect(
        bias is None or tuple(bias.shape) == (width,),
        f"bias_gelu: found bias {bias is not None and tuple(bias.shape)}, expected ({width},), the last of x",
    )
    form = choose(impl, "bias_gelu", device=x.device, dtype=x.dtype)
    if form == "triton":
        return bias_gelu_op(x, bias)
    if form == "reference":
        return gelu_reference(x, bias)
    return F.gelu(x if bias is None else x + bias.to(x.dtype), approximate="tanh")
