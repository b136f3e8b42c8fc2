"""The public functions of the norms, registered as operators for torch.compile, autograd and checkpointing."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import philox
from kernels.dispatch import KernelError, choose, expect, wide
from kernels.norm.backward import backward
from kernels.norm.forward import forward, norm_reference
from kernels.norm.tiles import MAX_WIDTH
from kernels.philox import DropoutKey
from kernels.registration import call, operator


def _fake_backward(dy, dstream, x, weight, statistics, samples, positions, has_bias, *_) -> list[Tensor]:
    dropped = [] if samples is None else [x.new_empty(x.shape)]
    return [x.new_empty(x.shape), *[weight.new_empty(weight.shape) for _ in range(1 + has_bias)], *dropped]


norm_backward_op = operator("norm_backward", fake=_fake_backward)(backward)


def _fake(x, residual, weight, bias, samples, positions, eps, rms, *_) -> list[Tensor]:
    like = x if residual is None else residual
    statistics = x.new_empty((1 if rms else 2, x.numel() // x.shape[-1]), dtype=torch.float32)
    return [like.new_empty(x.shape), statistics, *([] if residual is None else [like.new_empty(x.shape)])]


def _save(ctx, inputs, output) -> None:
    x, residual, weight, bias, samples, positions, _, *ctx.rms_and_key = inputs
    _, statistics, *stream = output
    ctx.mark_non_differentiable(statistics)
    ctx.save_for_backward(*stream or (x,), weight, statistics, samples, positions)
    ctx.x_dtype, ctx.has_residual = x.dtype, residual is not None
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, dy, dstatistics, dstream: Any = None):
    x, weight, statistics, samples, positions = ctx.saved_tensors
    dweight = dbias = None
    if dy is not None:
        inputs = dy, dstream, x, weight, statistics, samples, positions, ctx.bias_dtype is not None
        dresidual, dweight, *rest = call(norm_backward_op, *inputs, *ctx.rms_and_key)
        dx = dresidual if samples is None else rest.pop()
        dbias = rest[0] if rest else None
    else:
        key = ctx.rms_and_key[1:]
        dresidual = dstream
        dx = dstream if samples is None else philox.dropout(dstream, DropoutKey(*key), samples, positions)
    # `to` takes a microsecond where there is nothing to do.
    dx = dx if dx.dtype == ctx.x_dtype else dx.to(ctx.x_dtype)
    dbias = dbias if dbias is None or dbias.dtype == ctx.bias_dtype else dbias.to(ctx.bias_dtype)
    return dx, dresidual if ctx.has_residual else None, dweight, dbias


norm_op = operator("norm", fake=_fake, save=_save, backward=_backward)(forward)


def normalised(form: str, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool) -> Tensor:
    """The reference, or with form "torch" PyTorch's own operator."""
    if form == "reference":
        return norm_reference(x, weight, bias, eps, rms)
    if rms:
        return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    return F.layer_norm(x, weight.shape, weight.to(x.dtype), bias, eps)


def expect_weights(op: str, x: Tensor, *weights: Tensor | None) -> None:
    C = x.shape[-1]
    for weight in weights:
        if weight is not None and weight.shape != (C,):
            shapes = [tuple(t.shape) for t in weights if t is not None]
            raise KernelError(f"{op}: found weight and bias of shapes {shapes}, expected ({C},), the last of x")


def no_triton(width: int) -> str | None:
    """Why the Triton form cannot normalise rows of this width, or None."""
    if width <= MAX_WIDTH:
        return None
    return f"found rows of width {width}, expected at most {MAX_WIDTH}: use impl=torch or reference"


def norm(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, impl: str) -> Tensor:
    expect_weights(op, x, weight, bias)
    rms = op == "rms_norm"
    form = choose(impl, op, device=x.device, dtype=x.dtype, no_triton=no_triton(x.shape[-1]))
    if form == "triton":
        return call(norm_op, x, None, weight, bias, None, None, float(eps), rms, 0.0, 0, 0)[0]
    return normalised(form, x, weight, bias, eps, rms)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5, *, impl: str = "auto") -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension, in fp32 (Ba et al. 2016).

    x [..., C] with any strides, C at most 16,384 in the triton form; weight, bias [C], of any dtype; bias may be None.
    Returns [..., C] in the dtype of x. Differentiable once. impl: see kernels/dispatch.py. Raises KernelError on wrong
    shapes or a form that cannot run.
    """
    return norm("layer_norm", x, weight, bias, eps, impl)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, *, impl: str = "auto") -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight in fp32 (Zhang & Sennrich 2019); arguments and errors as layer_norm's."""
    return norm("rms_norm", x, weight, None, eps, impl)


def add_norm(
    op: str, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float,
    dropout: DropoutKey | None, samples: Tensor | None, positions: Tensor | None, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    expect_weights(op, x, weight, bias)
    if x.shape != residual.shape:
        found = f"found x {tuple(x.shape)} and residual {tuple(residual.shape)}"
        raise KernelError(f"{op}: {found}, expected the same")
    key = dropout if dropout is not None and dropout.p > 0 else None
    if key is not None:
        found = [None if t is None else tuple(t.shape) for t in (samples, positions)]
        expect(
            x.ndim == 3 and found == [(x.shape[0],), (x.shape[1],)],
            f"{op}: found x {tuple(x.shape)} with samples and positions {found}, expected [B, T, C], [B], [T]: "
            f"dropout masks are drawn from their numbers",
        )
    rms = op == "add_rms_norm"
    dtype, stream_dtype = torch.promote_types(x.dtype, residual.dtype), residual.dtype
    form = choose(impl, op, device=x.device, dtype=dtype, no_triton=no_triton(x.shape[-1]))
    if form == "triton":
        drop = (samples, positions) if key else (None, None)
        numbers = (key.p, key.seed, key.site) if key else (0.0, 0, 0)
        y, _, stream = call(norm_op, x, residual, weight, bias, *drop, float(eps), rms, *numbers)
        return y, stream
    if form == "reference":
        x, residual = wide(x), wide(residual)
    if key is not None and samples is not None and positions is not None:
        x = philox.dropout(x, key, samples, positions)
    stream = (residual + x).to(stream_dtype)
    return normalised(form, stream, weight, bias, eps, rms), stream


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5, *,
    dropout: DropoutKey | None = None, samples: Tensor | None = None, positions: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, stream): stream = residual + dropout(x), rounded to residual's dtype; y = layer_norm(stream).

    x, residual [..., C] with any strides, [B, T, C] with dropout, which also takes samples int64 [B], global sample
    numbers, and positions int64 [T]; its mask is that of kernels.philox.dropout. weight, bias [C], of any dtype; bias
    may be None. Both results are [..., C] in the dtype of residual, and differentiable once; where only one is used,
    the backward costs nothing for the other. In 16 bits triton and reference round once, torch after each operation.
    impl: see kernels/dispatch.py. Raises KernelError on wrong shapes or a form that cannot run.
    """
    return add_norm("add_layer_norm", x, residual, weight, bias, eps, dropout, samples, positions, impl)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5, *,
    dropout: DropoutKey | None = None, samples: Tensor | None = None, positions: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As add_layer_norm, with y = rms_norm(stream)."""
    return add_norm("add_rms_norm", x, residual, weight, None, eps, dropout, samples, positions, impl)
