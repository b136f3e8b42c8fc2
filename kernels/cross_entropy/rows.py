"""Cross-entropy of logits, with z-loss and soft-cap, over a vocabulary on one rank or split over several.

N tokens, V columns of logits, of which the first `rows` are token ids and the others padding. With softcap c > 0 a
logit u counts as z = c tanh(u / c) (Gemma 2, 2024), else z = u. For a token with target t and lse = log sum_j exp(z_j)

    loss = lse - z_t + z_loss lse^2                                     (z-loss: Chowdhery et al. 2022, section 5)
    dloss / du_j = ((1 + 2 z_loss lse) exp(z_j - lse) - [j = t]) (1 - (z_j / c)^2)         (last factor if c > 0)

One program works on a row. It reads the row for an online log-sum-exp. If the gradient follows at once, it reads the
row again, then from the cache, and writes the gradient. All sums have a fixed order: the same bits on every run.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cross_entropy import reference
from kernels.cross_entropy.vocabulary import FullVocabulary, Terms, Vocabulary, check
from kernels.dispatch import KernelError, cdiv, choose, padded, readable
from kernels.plan import Plan, planned
from kernels.registration import operator
from kernels.softcap import tanh_of_half

IGNORED = -100  # torch's default for a target that is not counted
VECTOR = tl.constexpr(8)  # columns in a row that one thread reads together: 16 bytes in 16 bits
LOG2E = tl.constexpr(1.4426950408889634)
LARGEST = tl.constexpr(3.4028234663852886e38)


def writable(out: Tensor, like: Tensor) -> Tensor:
    """`out`, or what the kernels write instead and must be copied to it (which refuses rows that share memory)."""
    return out if out.dtype == like.dtype and out.stride(-1) == 1 and out.stride(0) > 0 else torch.empty_like(like)


def _fake(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    value = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return value, torch.empty_like(value)


def tile_of(columns: int) -> tuple[int, int]:
    """(vectors of a tile, warps) for rows of `columns`: few registers, so that an SM's threads are all at work.

    Wide rows have many warps: the rows under way on 132 SMs, three of 50k or one of 128k 16-bit logits each, are 40 MB
    or less, and their second reading finds them in the cache.
    """
    warps = next((few for widest, few in ((1024, 1), (4096, 4), (16384, 8), (65536, 16)) if columns <= widest), 32)
    return min(padded(cdiv(columns, 8), 32), (64 if warps in (1, 32) else 32) * warps), warps


@triton.jit
def capped(u, softcap, SOFTCAP: tl.constexpr):
    """softcap * tanh(u / softcap) of logits u in any dtype, in fp32; u itself unless SOFTCAP."""
    u = u.to(tl.float32)
    return softcap * tanh_of_half(u * (2.0 * LOG2E / softcap)) if SOFTCAP else u


@triton.jit
def load_tile(row_ptr, cols, rows, softcap, MASKED: tl.constexpr, SOFTCAP: tl.constexpr):
    """The capped logits of `cols`; MASKED: some are not below `rows`."""
    # Without a mask where there need be none: that of a ragged row would forbid wide loads.
    u = tl.load(row_ptr + cols, cols < rows, 0.0) if MASKED else tl.load(row_ptr + cols)
    return capped(u, softcap, SOFTCAP)


@triton.jit
def add_tile(top, total, z):
    """The running maximum and sum of exp(z - maximum) of each lane, with one more vector each."""
    # Finite, so that neither -inf - -inf nor inf - inf is taken: a logit of +inf makes the sum +inf.
    higher = tl.minimum(tl.maximum(top, tl.max(z, 1)), LARGEST)
    powers = tl.exp2((z - higher[:, None]) * LOG2E)
    return higher, total * tl.exp2((top - higher) * LOG2E) + tl.sum(powers, 1)


@triton.jit
def row_log_sum(row_ptr, rows, softcap, LANES: tl.constexpr, SOFTCAP: tl.constexpr):
    """log sum_j exp(z_j) over the columns below `rows`: -inf if there are none."""
    tile = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    top, total = tl.full((LANES,), -LARGEST, tl.float32), tl.zeros((LANES,), tl.float32)
    full = rows // (LANES * VECTOR) * (LANES * VECTOR)
    for first in range(0, full, LANES * VECTOR):
        top, total = add_tile(top, total, load_tile(row_ptr, first + tile, rows, softcap, False, SOFTCAP))
    if full < rows:
        z = load_tile(row_ptr, full + tile, rows, softcap, True, SOFTCAP)
        top, total = add_tile(top, total, tl.where(full + tile < rows, z, float("-inf")))
    highest = tl.max(top, 0)
    return highest + tl.log(tl.sum(total * tl.exp2((top - highest) * LOG2E), 0))


@triton.jit
def gradient_tile(z, cols, local, log_sum, weight, factor, softcap, SOFTCAP: tl.constexpr):
    """factor * dloss / du of a tile of capped logits z."""
    gradient = weight * tl.exp2((z - log_sum) * LOG2E) - tl.where(cols == local, factor, 0.0)
    if SOFTCAP:
        gradient *= 1.0 - (z / softcap) * (z / softcap)
    return gradient


@triton.jit
def write_gradient(
    row_ptr, out_ptr, columns, rows, local, log_sum, factor, z_loss, softcap,
    LANES: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """factor * dloss / du of a row, 0 in its padding; out_ptr may be row_ptr."""
    tile = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    weight = factor * (1.0 + 2.0 * z_loss * log_sum)
    full = rows // (LANES * VECTOR) * (LANES * VECTOR)
    # From the end, which was read last and is the likeliest to be in the cache still.
    for first in range(full, columns, LANES * VECTOR):
        cols = first + tile
        z = load_tile(row_ptr, cols, rows, softcap, True, SOFTCAP)
        gradient = gradient_tile(z, cols, local, log_sum, weight, factor, softcap, SOFTCAP)
        gradient = tl.where(cols < rows, gradient, 0.0)
        tl.store(out_ptr + cols, gradient.to(out_ptr.dtype.element_ty), cols < columns)
    for done in range(0, full, LANES * VECTOR):
        cols = full - LANES * VECTOR - done + tile
        z = load_tile(row_ptr, cols, rows, softcap, False, SOFTCAP)
        gradient = gradient_tile(z, cols, local, log_sum, weight, factor, softcap, SOFTCAP)
        tl.store(out_ptr + cols, gradient.to(out_ptr.dtype.element_ty))


@triton.jit
def write_zeros(out_ptr, columns, LANES: tl.constexpr):
    tile = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    zeros = tl.zeros((LANES, VECTOR), out_ptr.dtype.element_ty)
    for first in range(0, columns, LANES * VECTOR):
        tl.store(out_ptr + first + tile, zeros, first + tile < columns)


@triton.jit(do_not_specialize=["start", "ignore_index"])
def cross_entropy_kernel(
    logits_ptr, targets_ptr, grad_ptr, value_ptr, log_sum_ptr, out_ptr, stride_row, stride_out, columns,
    rows, start, ignore_index, z_loss, softcap,
    LANES: tl.constexpr, SOFTCAP: tl.constexpr, FORWARD: tl.constexpr, LOSS: tl.constexpr, GRADIENT: tl.constexpr,
    HAS_GRAD: tl.constexpr,
):  # fmt: skip
    """One row of logits [N, columns]. FORWARD: its log-sum-exp, which else is read, and LOSS: its loss, else its
    target's logit; fp32 [N] each.

    GRADIENT: that of the loss, times grad [N] if there is one, is written to out, which may be the logits. A target
    that is not counted gives zeros.
    """
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_row
    target = tl.load(targets_ptr + row)
    if target == ignore_index:
        if FORWARD:
            tl.store(log_sum_ptr + row, 0.0)
            tl.store(value_ptr + row, 0.0)
        if GRADIENT:
            write_zeros(out_ptr + row * stride_out, columns, LANES)
    else:
        local = tl.where((target >= start) & (target < start + rows), target - start, -1).to(tl.int32)
        if FORWARD:
            value = capped(tl.load(row_ptr + local, local >= 0, 0.0), softcap, SOFTCAP)
            log_sum = row_log_sum(row_ptr, rows, softcap, LANES, SOFTCAP)
            if LOSS:
                value = log_sum - value + z_loss * log_sum * log_sum
            tl.store(log_sum_ptr + row, log_sum)
            tl.store(value_ptr + row, value)
        else:
            log_sum = tl.load(log_sum_ptr + row)
        if GRADIENT:
            factor = 1.0
            if HAS_GRAD:
                factor = tl.load(grad_ptr + row)
            write_gradient(
                row_ptr, out_ptr + row * stride_out, columns, rows, local, log_sum, factor, z_loss, softcap,
                LANES, SOFTCAP,
            )  # fmt: skip


@triton.jit
def scale_rows_kernel(x_ptr, factor_ptr, stride_row, columns, LANES: tl.constexpr):
    """x [N, columns] *= factor [N], one row; a row whose factor is 1 is not touched."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_row
    factor = tl.load(factor_ptr + row)
    if factor != 1.0:
        tile = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
        for first in range(0, columns, LANES * VECTOR):
            cols = first + tile
            x = tl.load(x_ptr + cols, cols < columns, 0.0).to(tl.float32)
            tl.store(x_ptr + cols, (x * factor).to(x_ptr.dtype.element_ty), cols < columns)


@planned
def plan_of(
    kernel: Any, shape: torch.Size, strides: tuple[int, ...], numbers: tuple, flags: tuple[bool, ...],
    dtype: torch.dtype, device: torch.device,
) -> Plan:  # fmt: skip
    """`kernel` on each row of [N, V]. numbers, flags: what it takes after the width, and after LANES."""
    lanes, warps = tile_of(shape[1])
    return Plan(kernel, shape[0], device, *strides, shape[1], *numbers, lanes, *flags, warps=warps)


def run(
    logits: Tensor, targets: Tensor, grad: Tensor | None, value: Tensor | None, log_sum: Tensor,
    gradient: Tensor | None, numbers: tuple, loss: bool,
) -> None:  # fmt: skip
    """cross_entropy_kernel, forward if `value` is given; `gradient` may be the logits. numbers: of Terms."""
    (seen,) = readable(logits)
    out = seen if gradient is None else writable(gradient, seen)
    *_, softcap = numbers
    flags = softcap > 0, value is not None, loss, gradient is not None, grad is not None
    strides = seen.stride(0), out.stride(0)
    plan = plan_of(cross_entropy_kernel, seen.shape, strides, numbers, flags, seen.dtype, seen.device)
    plan(seen, targets.contiguous(), None if grad is None else grad.contiguous(), value, log_sum, out)
    if gradient is not None and out is not gradient:
        gradient.copy_(out)


@operator("cross_entropy_forward", fake=_fake, mutates=("gradient",))
def cross_entropy_forward_op(
    logits: Tensor, targets: Tensor, gradient: Tensor | None,
    rows: int, start: int, ignore_index: int, z_loss: float, softcap: float, loss: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(losses, or else the targets' logits; log-sum-exp) fp32 [N] each; the losses' gradient goes to `gradient`."""
    value, log_sum = _fake(logits)
    run(logits, targets, None, value, log_sum, gradient, (rows, start, ignore_index, z_loss, softcap), loss)
    return value, log_sum


@operator("cross_entropy_backward", fake=lambda *_: None, mutates=("gradient",))
def cross_entropy_backward_op(
    grad: Tensor | None, logits: Tensor, targets: Tensor, log_sum: Tensor, gradient: Tensor,
    rows: int, start: int, ignore_index: int, z_loss: float, softcap: float,
) -> None:  # fmt: skip
    """To `gradient` [N, V], which may be the logits: that of the losses, times grad fp32 [N] if there is one."""
    run(logits, targets, grad, None, log_sum, gradient, (rows, start, ignore_index, z_loss, softcap), False)


@operator("scale_rows", fake=lambda *_: None, mutates=("x",))
def scale_rows_op(x: Tensor, factor: Tensor) -> None:
    """x [N, V] *= factor fp32 [N] of its row; rows whose factor is 1 cost nothing."""
    (seen,) = readable(x)
    plan = plan_of(scale_rows_kernel, seen.shape, seen.stride()[:1], (), (), seen.dtype, seen.device)
    plan(seen, factor.contiguous())
    if seen is not x:
        x.copy_(seen)


def combine(log_sum: Tensor, target_logit: Tensor, targets: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """(losses, log-sum-exp) fp32 [n] each over all columns, from the log-sum-exp and target's logit of this rank's."""
    log_sum, target_logit = terms.vocabulary.join(log_sum, target_logit)
    losses = log_sum - target_logit + terms.z_loss * log_sum.square()
    return losses.masked_fill(targets == terms.ignore_index, 0.0), log_sum


def stock(logits: Tensor, targets: Tensor, terms: Terms, differentiate: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """(losses, log-sum-exp, fp32 [N] each; the losses' gradient fp32 [N, V]); overwrites logits that are fp32."""
    z = logits.float()
    if terms.softcap > 0:
        z = z.div_(terms.softcap).tanh_()
        slope = 1.0 - z.square()
        z = z.mul_(terms.softcap)
    z[:, terms.vocabulary.rows :] = float("-inf")
    counted = targets != terms.ignore_index
    local = targets - terms.vocabulary.start
    owned = counted & (local >= 0) & (local < terms.vocabulary.rows)
    column = local.masked_fill(~owned, 0).unsqueeze(-1)
    target_logit = z.gather(-1, column).squeeze(-1).masked_fill(~owned, 0.0)
    losses, log_sum = combine(z.logsumexp(dim=-1), target_logit, targets, terms)
    if not differentiate:
        return losses, log_sum, None
    grad = z.sub_(log_sum.unsqueeze(-1)).exp_()  # softmax, in the logits' memory
    grad *= ((1.0 + 2.0 * terms.z_loss * log_sum) * counted).unsqueeze(-1)
    grad.scatter_add_(-1, column, -owned.to(grad.dtype).unsqueeze(-1))
    return losses, log_sum, grad.mul_(slope) if terms.softcap > 0 else grad


def triton_forward(logits: Tensor, targets: Tensor, terms: Terms, gradient: Tensor | None) -> tuple[Tensor, Tensor]:
    """(losses, log-sum-exp) fp32 [N] each, and the losses' gradient in `gradient`, which may be the logits."""
    if isinstance(terms.vocabulary, FullVocabulary):
        return cross_entropy_forward_op(logits, targets, gradient, *terms.numbers, True)
    target_logit, log_sum = cross_entropy_forward_op(logits, targets, None, *terms.numbers, False)
    losses, log_sum = combine(log_sum, target_logit, targets, terms)
    if gradient is not None:
        cross_entropy_backward_op(None, logits, targets, log_sum, gradient, *terms.numbers)
    return losses, log_sum


class CrossEntropy(torch.autograd.Function):
    """The losses and log-sum-exps. In place the gradient is computed along with them, and takes the logits' place."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, terms: Terms, differentiate: bool, inplace: bool, form: str
    ) -> tuple[Tensor, Tensor]:
        ctx.terms, ctx.inplace, ctx.form, ctx.dtype = terms, inplace, form, logits.dtype
        inplace = differentiate and inplace
        if form == "torch":
            z = logits if inplace else logits.to(torch.float32, copy=True)
            losses, log_sum, gradient = stock(z, targets, terms, differentiate)
            ctx.save_for_backward(gradient)
        else:
            losses, log_sum = triton_forward(logits, targets, terms, logits if inplace else None)
            ctx.save_for_backward(logits, *(() if inplace else (targets, log_sum)))
        log_sum = log_sum.masked_fill(targets == terms.ignore_index, 0.0)
        ctx.mark_non_differentiable(log_sum)
        return losses, log_sum

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        if ctx.form == "torch":
            gradient = (ctx.saved_tensors[0] * grad.unsqueeze(-1)).to(ctx.dtype)
        elif ctx.inplace:
            gradient = ctx.saved_tensors[0].detach()
            scale_rows_op(gradient, grad)
        else:
            logits, targets, log_sum = ctx.saved_tensors
            gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
            cross_entropy_backward_op(grad, logits, targets, log_sum, gradient, *ctx.terms.numbers)
        return gradient, None, None, None, None, None


def cross_entropy(
    logits: Tensor, targets: Tensor, *, z_loss: float = 0.0, ignore_index: int = IGNORED, softcap: float = 0.0,
    vocabulary: Vocabulary | None = None, inplace: bool = False, impl: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(losses, log-sum-exp) fp32 [N] each, 0 where targets are `ignore_index`; the equations are this file's.

    logits [N, V] with any strides; targets int64 [N], token ids, which are not checked. vocabulary: the columns that
    are this rank's, all of them if None. Differentiable once, with respect to the logits, through the losses.

    inplace=False: the logits are read once forward and once backward, and their gradient is a new tensor.
    inplace=True: the logits are consumed. Their gradient is computed along with the losses and takes their place; the
    backward pass, which can run once, multiplies those rows by what comes from above that it does not find to be 1
    (none for `losses.sum()`). Autograd refuses a backward pass that still needed the logits.

    impl: see kernels/dispatch.py; only triton keeps 16-bit gradients in 16 bits. Raises KernelError on wrong shapes or
    a form that cannot run.
    """
    vocabulary = vocabulary or FullVocabulary(logits.shape[-1])
    if logits.ndim != 2:
        raise KernelError(f"cross_entropy: found logits of shape {tuple(logits.shape)}, expected two dimensions")
    check("cross_entropy", logits.shape[0], logits.shape[1], targets, vocabulary)
    form = choose(impl, "cross_entropy", device=logits.device, dtype=logits.dtype)
    terms = Terms(vocabulary, ignore_index, z_loss, softcap)
    if form == "reference":
        return reference.cross_entropy(logits, targets, **terms._asdict())
    differentiate = torch.is_grad_enabled() and logits.requires_grad
    return CrossEntropy.apply(logits, targets, terms, differentiate, inplace, form)
