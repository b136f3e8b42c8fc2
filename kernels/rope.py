"""Rotary position encoding (Su et al. 2021), with the split of qkv into q, k and v in the same pass.

B batch, T time, K key/value heads, R query heads for each, H = K R, D head width. Pair i of a head is its channels
(a, b) = (i, i + D/2). At position p the pair is rotated by the angle p theta^(-2i/D):
    a' = a cos - b sin;  b' = b cos + a sin
The backward pass rotates the gradients back by the same angle and writes them into one dqkv, so only the positions are
kept. A program rotates a few heads of a tile of tokens, and computes the sine and cosine of their angles once.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dispatch import KernelError, cdiv, choose, empty_like, padded, readable, rounded, wide
from kernels.plan import Plan, planned
from kernels.registration import call, operator

TILE_PAIRS = 1024  # pairs of channels, of all tokens of a tile
HEADS = 6  # of a program: enough to share its sines and cosines, few enough to fill a GPU with programs


@triton.jit
def sine_and_cosine(angle):
    """sin and cos of fp32 angles to about 1 ulp of 1, up to 10^9 radians.

    The nearest multiple of pi/2 is taken off in float64; Taylor's series then need no more than |x| <= pi/4. The
    library's functions would reduce the angle twice, and branch to another method beyond 10^5.
    """
    quarters = tl.floor(angle.to(tl.float64) * 0.6366197723675814 + 0.5)
    x = (angle.to(tl.float64) - quarters * 1.5707963267948966).to(tl.float32)
    y = x * x
    sin = x + x * y * (-1 / 6 + y * (1 / 120 + y * (-1 / 5040 + y * (1 / 362880))))
    cos = 1.0 + y * (-1 / 2 + y * (1 / 24 + y * (-1 / 720 + y * (1 / 40320 + y * (-1 / 3628800)))))
    quadrant = quarters.to(tl.int64).to(tl.int32)
    swapped = (quadrant & 1) != 0
    sin, cos = tl.where(swapped, cos, sin), tl.where(swapped, sin, cos)
    return tl.where((quadrant & 2) != 0, -sin, sin), tl.where(((quadrant + 1) & 2) != 0, -cos, cos)


@triton.jit
def move_head(
    packed, split, cos, sin, inside,
    D: tl.constexpr, PAIRS: tl.constexpr, TURN: tl.constexpr, UNPACK: tl.constexpr,
):  # fmt: skip
    """Copy one head, whose tokens begin at pointers [TOKENS, 1], from qkv to q, k or v if UNPACK, else back; turned by
    cos, sin fp32 [TOKENS, PAIRS] if TURN.
    """
    source = packed if UNPACK else split
    target = split if UNPACK else packed
    cols = tl.arange(0, PAIRS)[None, :]
    inside = inside & (cols < D // 2)
    a = tl.load(source + cols, inside)
    b = tl.load(source + D // 2 + cols, inside)
    if TURN:
        left, right = a.to(tl.float32), b.to(tl.float32)
        a, b = left * cos - right * sin, right * cos + left * sin
    tl.store(target + cols, a.to(target.dtype.element_ty), inside)
    tl.store(target + D // 2 + cols, b.to(target.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["N", "T"])
def rope_kernel(
    x_ptr, q_ptr, k_ptr, v_ptr, positions_ptr, frequencies_ptr,
    stride_xb, stride_xt, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh, stride_pb, stride_pt, N, T, R, heads,
    D: tl.constexpr, TOKENS: tl.constexpr, PAIRS: tl.constexpr, HEADS: tl.constexpr,
    UNPACK: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """N = B T tokens of `heads` heads, from x [B, T, heads D] to q, k, v [B, T, ..., D] if UNPACK, else from these to
    x; strides are of batch, token and head. The heads of x are grouped: R of q, one of k, one of v. INVERSE: turn back.
    """
    chunks = tl.cdiv(heads, HEADS)
    first = (tl.program_id(0) % chunks) * HEADS
    token = (tl.program_id(0) // chunks) * TOKENS + tl.arange(0, TOKENS)
    exists = token < N
    b, t = (token // T).to(tl.int64), (token % T).to(tl.int64)
    position = tl.load(positions_ptr + b * stride_pb + t * stride_pt, exists, 0).to(tl.float32)
    pair = tl.arange(0, PAIRS)
    angle = position[:, None] * tl.load(frequencies_ptr + pair, pair < D // 2, 0.0)[None, :]
    sin, cos = sine_and_cosine(angle)
    if INVERSE:
        sin = -sin
    inside = exists[:, None]
    packed = x_ptr + (b * stride_xb + t * stride_xt)[:, None]
    q = q_ptr + (b * stride_qb + t * stride_qt)[:, None]
    k = k_ptr + (b * stride_kb + t * stride_kt)[:, None]
    v = v_ptr + (b * stride_vb + t * stride_vt)[:, None]
    for head in range(first, tl.minimum(first + HEADS, heads)):
        group = head // (R + 2)
        member = head % (R + 2)
        packed_head = packed + head * D
        if member < R:
            split_head = q + (group * R + member).to(tl.int64) * stride_qh
            move_head(packed_head, split_head, cos, sin, inside, D, PAIRS, True, UNPACK)
        elif member == R:
            split_head = k + group.to(tl.int64) * stride_kh
            move_head(packed_head, split_head, cos, sin, inside, D, PAIRS, True, UNPACK)
        else:
            split_head = v + group.to(tl.int64) * stride_vh
            move_head(packed_head, split_head, cos, sin, inside, D, PAIRS, False, UNPACK)


@planned
def plan_of(
    unpack: bool, shape: torch.Size, K: int, strides: tuple[tuple[int, ...], ...], dtype: torch.dtype,
    device: torch.device,
) -> Plan:  # fmt: skip
    """rope_kernel on x [B, T, (R + 2) K D], q of `shape` [B, T, R K, D], k, v [B, T, K, D], all with contiguous rows.

    strides: of these and of the positions.
    """
    (B, T, H, D), (x, q, k, v, positions) = shape, strides
    heads, PAIRS = H + 2 * K, padded(D // 2)
    TOKENS = max(1, TILE_PAIRS // PAIRS)
    return Plan(
        rope_kernel, cdiv(B * T, TOKENS) * cdiv(heads, HEADS), device, *x[:2], *q[:3], *k[:3], *v[:3],
        *(0, *positions)[-2:], B * T, T, H // K, heads, D, TOKENS, PAIRS, HEADS, unpack, not unpack,
    )  # fmt: skip


def run(packed: Tensor, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, theta: float, *, unpack: bool) -> None:
    """rope_kernel from packed to q, k and v if `unpack`, else back, turned back."""
    shape, strides = q.shape, (packed.stride(), q.stride(), k.stride(), v.stride(), positions.stride())
    plan = plan_of(unpack, shape, k.shape[2], strides, packed.dtype, packed.device)
    plan(packed, q, k, v, positions, kept_frequencies(shape[3], theta, packed.device))


def empty_packed(q: Tensor, k: Tensor, *_: Any) -> Tensor:
    """Room for q, k and v together."""
    B, T, H, D = q.shape
    return q.new_empty(B, T, (H + 2 * k.shape[2]) * D)


@operator("rope_qkv_backward", fake=empty_packed)
def rope_qkv_backward_op(dq: Tensor, dk: Tensor, dv: Tensor, positions: Tensor, theta: float) -> Tensor:
    """dq [B, T, H, D], dk and dv [B, T, K, D] with any strides -> dqkv [B, T, (R + 2) K D]."""
    q, k, v = readable(dq, dk, dv)
    packed = empty_packed(q, k)
    run(packed, q, k, v, positions, theta, unpack=False)
    return rounded(packed, dq.dtype)


def empty_split(qkv: Tensor, _: Tensor, __: float, K: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for q, k and v."""
    B, T, W = qkv.shape
    k = qkv.new_empty(B, T, K, D)
    return qkv.new_empty(B, T, W // D - 2 * K, D), k, empty_like(k)


def _save_qkv(ctx, inputs, output) -> None:
    qkv, positions, ctx.theta, K, D = inputs
    ctx.heads = qkv.shape[-1] // D - 2 * K, K, K
    ctx.save_for_backward(positions)


def _backward_qkv(ctx, dq, dk, dv):
    if dq is None or dk is None or dv is None:
        given = next(g for g in (dq, dk, dv) if g is not None)
        B, T, _, D = given.shape
        pairs = zip((dq, dk, dv), ctx.heads, strict=True)
        dq, dk, dv = [given.new_zeros(D).expand(B, T, n, D) if g is None else g for g, n in pairs]
    return call(rope_qkv_backward_op, dq, dk, dv, *ctx.saved_tensors, ctx.theta)


@operator("rope_qkv", fake=empty_split, save=_save_qkv, backward=_backward_qkv)
def rope_qkv_op(qkv: Tensor, positions: Tensor, theta: float, K: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [B, T, (R + 2) K D] -> q [B, T, H, D], k and v [B, T, K, D], contiguous."""
    (packed,) = readable(qkv)
    q, k, v = empty_split(packed, positions, theta, K, D)
    run(packed, q, k, v, positions, theta, unpack=True)
    return rounded(q, qkv.dtype), rounded(k, qkv.dtype), rounded(v, qkv.dtype)


def frequencies_of(D: int, theta: float, device: torch.device) -> Tensor:
    """theta^(-2i/D), fp32 [D/2]. All forms use these: at position 10^6 a frequency that is rounded
    differently in its last bit turns by 0.06 more or less.
    """
    return theta ** (-torch.arange(0, D, 2, device=device, dtype=torch.float32) / D)


@lru_cache(maxsize=64)
def kept_frequencies(D: int, theta: float, device: torch.device) -> Tensor:
    """`frequencies_of` that later calls share. Only for operators, which see no fake tensors and save none of these."""
    frequencies = frequencies_of(D, theta, device)
    if device.type == "cuda":  # other streams read them too; inside a graph's capture this raises
        torch.cuda.current_stream(device).synchronize()
    return frequencies


def angles_of(x: Tensor, positions: Tensor, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles of the pairs in heads of x [B, T, ..., D], in the dtype that x is turned in: each
    [(B,) T, 1 ..., D/2].
    """
    D = x.shape[-1]
    angles = (positions.float()[..., None] * frequencies_of(D, theta, x.device)).to(wide(x).dtype)
    angles = angles.view(*positions.shape, *[1] * (x.dim() - 3), D // 2)
    return angles.cos(), angles.sin()


def rope_reference(x: Tensor, positions: Tensor, *, theta: float = 10000.0) -> Tensor:
    """Turn pair i of heads of x [B, T, ..., D] by position * theta^(-2i/D), in fp32; positions [T] or [B, T]."""
    cos, sin = angles_of(x, positions, theta)
    a, b = wide(x).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def rope_qkv_reference(
    qkv: Tensor, positions: Tensor, *, n_kv_head: int, head_dim: int, theta: float = 10000.0
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [B, T, (R + 2) K D] -> q [B, T, K R, D], k, v [B, T, K, D]; k and v are views."""
    R = qkv.shape[-1] // (n_kv_head * head_dim) - 2
    heads = qkv.unflatten(-1, (n_kv_head, R + 2, head_dim))
    qk, v = heads[:, :, :, : R + 1], heads[:, :, :, R + 1]
    qk = rope_reference(qk, positions, theta=theta)
    return qk[:, :, :, :R].flatten(2, 3), qk[:, :, :, R], v


def turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """Return x [B, T, K, R, D], turned, in `out` of the same shape; cos, sin [(B,) T, 1, 1, D/2]."""
    (a, b), (left, right) = x.to(out.dtype).chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(a, cos, out=left).sub_(b * sin)
    torch.mul(b, cos, out=right).add_(a * sin)
    return out


class StockRope(torch.autograd.Function):
    """The torch form: rope_qkv_reference to the bit, without autograd's copies of what it splits and joins."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, positions: Tensor, theta: float, K: int, D: int) -> tuple[Tensor, ...]:
        heads = qkv.unflatten(-1, (K, -1, D))
        angles = angles_of(heads, positions, theta)
        ctx.save_for_backward(*angles)
        *turned, v = heads.split((heads.shape[3] - 2, 1, 1), dim=3)
        q, k = (turn(x, *angles, wide(x.new_empty(x.shape))) for x in turned)
        v = v.squeeze(3).clone(memory_format=torch.contiguous_format)
        return q.flatten(2, 3).to(qkv.dtype), k.squeeze(3).to(qkv.dtype), v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        (B, T, K, D), R = dk.shape, dq.shape[2] // dk.shape[2]
        heads = wide(dk.new_empty(B, T, K, R + 2, D))
        turn(dq.unflatten(2, (K, R)), cos, -sin, heads[:, :, :, :R])
        turn(dk.unsqueeze(3), cos, -sin, heads[:, :, :, R : R + 1])
        heads[:, :, :, R + 1] = dv
        return heads.flatten(2).to(dk.dtype), None, None, None, None


def rope_qkv(
    qkv: Tensor, positions: Tensor, *, n_kv_head: int, head_dim: int, theta: float = 10000.0, impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Queries and keys with rotary position encoding (Su et al. 2021, eq. 34), and values, from their one product.

    qkv [B, T, (R + 2) K D], K = n_kv_head, D = head_dim: [q_1 ... q_R, k, v] for each key/value head, any strides (a
    last dimension that is not contiguous costs a copy).
    positions int64 [T], or [B, T] for each token its own (packed documents). Angles are position theta^(-2i/D) in
    fp32, and channels i and i + D/2 are turned in fp32. Returns q [B, T, K R, D], k, v [B, T, K, D] in the dtype of
    qkv; of the reference k and v are views. Differentiable once. impl: see kernels/dispatch.py. Raises KernelError on
    arguments that do not fit together or a form that cannot run.
    """
    group = n_kv_head * head_dim
    if qkv.dim() != 3 or n_kv_head < 1 or head_dim < 1 or qkv.shape[-1] % group or qkv.shape[-1] < 3 * group:
        sizes = f"K = {n_kv_head}, D = {head_dim} and R at least 1"
        raise KernelError(f"rope_qkv: found qkv {tuple(qkv.shape)}, expected [B, T, (R + 2) K D] with {sizes}")
    if head_dim % 2:
        raise KernelError(f"rope_qkv: found heads of width {head_dim}, expected an even width: channels turn in pairs")
    B, T = qkv.shape[:2]
    if positions.dtype != torch.int64 or positions.shape not in ((T,), (B, T)) or positions.device != qkv.device:
        found = f"{positions.dtype} {tuple(positions.shape)} on {positions.device}"
        expected = f"int64 ({T},), or ({B}, {T}) for each token its own, on {qkv.device}"
        raise KernelError(f"rope_qkv: found positions {found}, expected {expected}")
    form = choose(impl, "rope_qkv", device=qkv.device, dtype=qkv.dtype)
    if form == "triton":
        return call(rope_qkv_op, qkv, positions, float(theta), n_kv_head, head_dim)
    if form == "torch" and not torch.compiler.is_compiling():  # which makes one kernel of the reference by itself
        return StockRope.apply(qkv, positions, theta, n_kv_head, head_dim)  # pyright: ignore[reportReturnType]
    return rope_qkv_reference(qkv, positions, n_kv_head=n_kv_head, head_dim=head_dim, theta=theta)
