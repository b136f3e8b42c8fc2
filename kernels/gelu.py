"""GELU by its tanh approximation (Hendrycks & Gimpel 2016, section 2; GPT-2's), forward and backward.

With s = sigmoid(2 u) and u = sqrt(2 / pi) (x + 0.044715 x^3):
    y = x (1 + tanh(u)) / 2 = x s;  dx = dy (s + 2 x s (1 - s) du/dx)
The backward pass computes s again, so only x is kept. M rows (all leading dimensions together), F width; a contiguous
tensor is treated as one row.
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import KernelError, choose, wide
from kernels.registration import call
from kernels.swiglu import elementwise, sigmoids

TWICE_SLOPE: tl.constexpr = tl.constexpr(2 * math.sqrt(2 / math.pi))
CUBE: tl.constexpr = tl.constexpr(0.044715)


@triton.jit
def tile_at(stride_y, M, ROWS: tl.constexpr, COLS: tl.constexpr):
    """This program's rows [ROWS, 1], columns [1, COLS] and which elements of [M, stride_y] they are inside of."""
    tiles = tl.cdiv(tl.cast(stride_y, tl.int64), COLS)
    rows = ((tl.program_id(0) // tiles) * ROWS + tl.arange(0, ROWS))[:, None]
    cols = ((tl.program_id(0) % tiles) * COLS + tl.arange(0, COLS))[None, :]
    return rows, cols, (rows < M) & (cols < stride_y)


@triton.jit(do_not_specialize=["M"])
def gelu_forward_kernel(x_ptr, y_ptr, stride_x, stride_y, M, ROWS: tl.constexpr, COLS: tl.constexpr):
    """One tile: x [M, F] with row stride stride_x -> y [M, F] contiguous, F = stride_y."""
    # Triton types a call from one kernel to another as if it were made from the host.
    rows, cols, inside = tile_at(stride_y, M, ROWS, COLS)  # pyright: ignore[reportGeneralTypeIssues]
    x = tl.load(x_ptr + rows * stride_x + cols, inside).to(tl.float32)
    y = x * tl.sigmoid(x * TWICE_SLOPE * (1.0 + x * x * CUBE))
    tl.store(y_ptr + rows * stride_y + cols, y.to(y_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["M"])
def gelu_backward_kernel(
    dy_ptr, x_ptr, dx_ptr, stride_dy, stride_x, stride_y, M, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """One tile: dy and x [M, F] with their row strides -> dx [M, F] contiguous, F = stride_y."""
    rows, cols, inside = tile_at(stride_y, M, ROWS, COLS)  # pyright: ignore[reportGeneralTypeIssues]
    x = tl.load(x_ptr + rows * stride_x + cols, inside, 0.0).to(tl.float32)
    dy = tl.load(dy_ptr + rows * stride_dy + cols, inside, 0.0).to(tl.float32)
    s, rest = sigmoids(x * TWICE_SLOPE * (1.0 + x * x * CUBE))  # pyright: ignore[reportGeneralTypeIssues]
    slope = (1.0 + x * x * (3 * CUBE)) * TWICE_SLOPE
    dx = dy * s * (1.0 + x * rest * slope)
    tl.store(dx_ptr + rows * stride_y + cols, dx.to(dx_ptr.dtype.element_ty), inside)


gelu_op, gelu_backward_op = elementwise("gelu", gelu_forward_kernel, gelu_backward_kernel)


def gelu_reference(x: Tensor) -> Tensor:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))."""
    z = wide(x)
    return (0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))).to(x.dtype)


def gelu(x: Tensor, *, impl: str = "auto") -> Tensor:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) (Hendrycks & Gimpel 2016, sec. 2).

    x [..., F] with any strides; a last dimension that is not contiguous, and leading dimensions that do not merge into
    one stride, cost a copy. Returns [..., F] in the dtype of x; fp32 inside. Differentiable once. impl: see
    kernels/dispatch.py. Raises KernelError on an empty last dimension or a form that cannot run.
    """
    if x.dim() == 0 or x.shape[-1] == 0:
        raise KernelError(f"gelu: found x {tuple(x.shape)}, expected [..., F] with F at least 1")
    form = choose(impl, "gelu", device=x.device, dtype=x.dtype)
    if form == "triton":
        return call(gelu_op, x)
    return gelu_reference(x) if form == "reference" else F.gelu(x, approximate="tanh")
