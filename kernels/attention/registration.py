"""`attention`'s registration as operators for torch.compile, autograd and checkpointing.

An operator takes the options of `attention` as plain numbers: window 0 is none; sparse is [] or [block, local, stride].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.attention import backward as backward_pass
from kernels.attention import forward as forward_pass
from kernels.attention.options import Options, Strided
from kernels.philox import DropoutKey


def options_of(
    window: int, sparse: Sequence[int], softcap: float, p: float, seed: int, site: int, head_offset: int,
    deterministic: bool,
) -> Options:  # fmt: skip
    key = DropoutKey(p, seed, site) if p > 0 else None
    return Options(window or None, Strided(*sparse) if sparse else None, softcap, key, head_offset, deterministic)


@torch.library.custom_op("ingot::attention", mutates_args=())
def attention_op(
    q: Tensor, k: Tensor, v: Tensor, samples: Tensor | None, cu_seqlens: Tensor | None,
    window: int, sparse: Sequence[int], softcap: float, p: float, seed: int, site: int, head_offset: int,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(o [B, Tq, H, D], lse in base 2, fp32 [B, H, Tq])."""
    options = options_of(window, sparse, softcap, p, seed, site, head_offset, deterministic)
    return forward_pass.forward(q, k, v, options, samples, cu_seqlens)


@attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest) -> tuple[Tensor, Tensor]:
    B, Tq, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, Tq), dtype=torch.float32)


@torch.library.custom_op("ingot::attention_backward", mutates_args=())
def attention_backward_op(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, samples: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int, sparse: Sequence[int], softcap: float, p: float, seed: int, site: int, head_offset: int,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv)."""
    options = options_of(window, sparse, softcap, p, seed, site, head_offset, deterministic)
    return backward_pass.backward(do, dlse, q, k, v, o, lse, options, samples, cu_seqlens)


@attention_backward_op.register_fake
def _(do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:
    q, k, v, samples, cu_seqlens, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, samples, cu_seqlens)


def _backward(ctx, do, dlse):
    if do is None and dlse is None:
        return (None,) * (5 + len(ctx.options))
    q, k, v, o, lse, samples, cu_seqlens = ctx.saved_tensors
    do = torch.zeros_like(o) if do is None else do
    saved = (q, k, v, o, lse, samples, cu_seqlens)
    gradients = torch.ops.ingot.attention_backward(do, dlse, *saved, *ctx.options)
    return *gradients, *(None,) * (2 + len(ctx.options))


attention_op.register_autograd(_backward, setup_context=_save)
