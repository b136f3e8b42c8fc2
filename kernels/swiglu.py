"""SwiGLU's product (Shazeer 2020), silu(gate) * up, forward and backward in one kernel each.

M rows (all leading dimensions together), F width of the result; x has 2 F channels. With s = sigmoid(gate):
    y = gate s up;  dgate = dy up s (1 + gate (1 - s));  dup = dy gate s
The backward pass computes s again, so only x is kept. Gate and up are the even and odd channels, so a contiguous tensor
is one row of M F pairs, loaded in full 16-byte vectors.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dispatch import KernelError, cdiv, choose, empty_like, interpretable, padded, readable, rounded, wide
from kernels.plan import Plan, planned
from kernels.registration import OpOverload, call, operator

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
def load_pairs(
    x_ptr, stride_x, stride_y, M, ROWS: tl.constexpr, COLS: tl.constexpr, VECTOR: tl.constexpr
):  # fmt: skip
    """This program's gate and up, fp32 [ROWS, COLS]; its rows [ROWS, 1]; its columns of the result and of x; and which
    elements of either exist. All numbers int64: twice the width of a flattened tensor may pass 2^31.
    """
    width = tl.cast(stride_y, tl.int64)
    tiles = tl.cdiv(width, COLS)
    rows = ((tl.program_id(0) // tiles) * ROWS + tl.arange(0, ROWS))[:, None]
    first = (tl.program_id(0) % tiles) * COLS
    # A thread that loads 16 bytes of pairs holds half as many results. Told that no more of them lie together, the
    # compiler leaves them with their thread instead of passing them around through shared memory.
    cols = tl.max_contiguous(first + tl.arange(0, COLS), VECTOR)[None, :]
    pairs = first * 2 + tl.arange(0, 2 * COLS)[None, :]
    pairs_inside = (rows < M) & (pairs < 2 * width)
    x = tl.load(x_ptr + rows * stride_x + pairs, pairs_inside).to(tl.float32)
    gate, up = tl.split(x.reshape(ROWS, COLS, 2))
    return gate, up, rows, cols, pairs, (rows < M) & (cols < width), pairs_inside


@triton.jit(do_not_specialize=["M"])
def swiglu_forward_kernel(
    x_ptr, y_ptr, stride_x, stride_y, M, ROWS: tl.constexpr, COLS: tl.constexpr, VECTOR: tl.constexpr
):  # fmt: skip
    """One tile: x [M, 2 F] with row stride stride_x -> y [M, F] contiguous, F = stride_y."""
    # Triton types a call from one kernel to another as if it were made from the host.
    gate, up, rows, cols, _, inside, _ = load_pairs(  # pyright: ignore[reportGeneralTypeIssues]
        x_ptr, stride_x, stride_y, M, ROWS, COLS, VECTOR
    )
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + rows * stride_y + cols, y.to(y_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["M"])
def swiglu_backward_kernel(
    dy_ptr, x_ptr, dx_ptr, stride_dy, stride_x, stride_y, M,
    ROWS: tl.constexpr, COLS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One tile: dy [M, F] and x [M, 2 F] with their row strides -> dx [M, 2 F] contiguous, F = stride_y."""
    gate, up, rows, cols, pairs, inside, pairs_inside = load_pairs(  # pyright: ignore[reportGeneralTypeIssues]
        x_ptr, stride_x, stride_y, M, ROWS, COLS, VECTOR
    )
    dy = tl.load(dy_ptr + rows * stride_dy + cols, inside).to(tl.float32)
    s, rest = sigmoids(gate)  # pyright: ignore[reportGeneralTypeIssues]
    dgate = (dy * up * s * (1.0 + gate * rest)).to(dx_ptr.dtype.element_ty)
    dup = (dy * gate * s).to(dx_ptr.dtype.element_ty)
    dx = tl.join(dgate, dup).reshape(ROWS, 2 * COLS)
    tl.store(dx_ptr + rows * (2 * tl.cast(stride_y, tl.int64)) + pairs, dx, pairs_inside)


def over_tiles(kernel: Any, pairs: bool, halved: bool) -> Callable[..., Tensor]:
    """What runs `kernel` over tiles of a result [M, width]. pairs: it takes VECTOR, and its last input has a gate and
    an up channel for each column of a tile. halved: the result has half the channels of that input, else as many.
    """

    # Of this kernel alone: Triton's kernels as keys would be hashed in Python on every call.
    @planned
    def plan_of(M: int, width: int, strides: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Plan:
        ROWS, COLS = tile_of(M, width)
        vector = [8 // dtype.itemsize] * pairs  # results that a thread holds after loading 16 bytes of pairs
        return Plan(kernel, cdiv(M, ROWS) * cdiv(width, COLS), device, *strides, width, M, ROWS, COLS, *vector)

    def run(*inputs: Tensor) -> Tensor:
        """The result in the dtype of the last input."""
        x = inputs[-1]
        if all([t.is_contiguous() for t in inputs]):  # noqa: C419 - half the time of a generator; one row
            rows, M, strides = interpretable(*inputs), 1, (0,) * len(inputs)
        else:
            rows = readable(*[t.reshape(-1, t.shape[-1]) for t in inputs])
            M, strides = rows[0].shape[0], tuple([t.stride(0) for t in rows])
        given = rows[-1]
        out = given.new_empty(*x.shape[:-1], x.shape[-1] // 2) if halved else empty_like(x, given.dtype)
        plan_of(M, x.numel() // (M * (1 + pairs)), strides, out.dtype, x.device)(*rows, out)
        return rounded(out, x.dtype)

    return run


def elementwise(name: str, forward: Any, backward: Any, *, pairs: bool = False) -> tuple[OpOverload, OpOverload]:
    """Register and return two operators that run these kernels: ingot::name, x [..., F] -> y [..., F], or if `pairs`
    x [..., 2 F] -> y [..., F]; and name_backward, (dy, x) -> dx.
    """
    backward_op = operator(
        f"{name}_backward", schema="(Tensor dy, Tensor x) -> Tensor", fake=lambda dy, x: x.new_empty(x.shape)
    )(over_tiles(backward, pairs, False))
    op = operator(
        name,
        schema="(Tensor x) -> Tensor",
        fake=lambda x: x.new_empty(*x.shape[:-1], x.shape[-1] // (1 + pairs)),
        backward=lambda ctx, dy: call(backward_op, dy, *ctx.saved_tensors),
    )(over_tiles(forward, pairs, pairs))
    return op, backward_op


swiglu_op, swiglu_backward_op = elementwise("swiglu", swiglu_forward_kernel, swiglu_backward_kernel, pairs=True)


class EvenAndOdd(torch.autograd.Function):
    """x [..., 2 F] -> its even and its odd channels, [..., F] each and contiguous."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(c.clone(memory_format=torch.contiguous_format) for c in x.unflatten(-1, (-1, 2)).unbind(-1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, even: Tensor, odd: Tensor) -> Tensor:
        if even.dtype in (torch.float32, torch.float64):  # four times as fast as torch.stack on a CPU
            return torch.view_as_real(torch.complex(even, odd)).flatten(-2)
        return torch.stack((even, odd), dim=-1).flatten(-2)


def stock(x: Tensor) -> Tensor:
    """PyTorch's own operators."""
    if torch.compiler.is_compiling():  # which joins these by itself
        gate, up = x.unflatten(-1, (-1, 2)).unbind(-1)
    else:
        gate, up = EvenAndOdd.apply(x)  # pyright: ignore[reportGeneralTypeIssues]
    return F.silu(gate) * up


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
