"""`attention`, and its registration as operators for torch.compile, autograd and checkpointing.

B batch, Tq queries, Tk keys, H query heads, K key/value heads, D head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference
from kernels.attention import backward as backward_pass
from kernels.attention import forward as forward_pass
from kernels.dispatch import choose, expect
from kernels.philox import DropoutKey

MAX_HEAD_WIDTH = 256  # one tile holds a head


def key_of(p: float, seed: int, site: int) -> DropoutKey | None:
    return DropoutKey(p, seed, site) if p > 0 else None


@torch.library.custom_op("ingot::attention", mutates_args=())
def attention_op(
    q: Tensor, k: Tensor, v: Tensor, samples: Tensor | None,
    p: float, seed: int, site: int, head_offset: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(o [B, Tq, H, D], lse in base 2, fp32 [B, H, Tq])."""
    return forward_pass.forward(q, k, v, key_of(p, seed, site), samples, head_offset)


@attention_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, samples: Tensor | None,
    p: float, seed: int, site: int, head_offset: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, Tq, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, Tq), dtype=torch.float32)


@torch.library.custom_op("ingot::attention_backward", mutates_args=())
def attention_backward_op(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, samples: Tensor | None,
    p: float, seed: int, site: int, head_offset: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv)."""
    return backward_pass.backward(do, q, k, v, o, lse, key_of(p, seed, site), samples, head_offset)


@attention_backward_op.register_fake
def _(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, samples: Tensor | None,
    p: float, seed: int, site: int, head_offset: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:
    q, k, v, samples, *ctx.scalars = inputs
    o, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, o, lse, samples)


def _backward(ctx, do, dlse):
    if do is None:
        return (None,) * 8
    q, k, v, o, lse, samples = ctx.saved_tensors
    gradients = torch.ops.ingot.attention_backward(do, q, k, v, o, lse, samples, *ctx.scalars)
    return *gradients, *(None,) * 5


attention_op.register_autograd(_backward, setup_context=_save)


def stock(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's scaled_dot_product_attention, which takes [B, H, T, D]."""
    Tq, Tk = q.shape[1], k.shape[1]
    mask = None
    if 1 < Tq < Tk:
        mask = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril(Tk - Tq)
    return F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        attn_mask=mask, is_causal=1 < Tq == Tk, enable_gqa=q.shape[2] != k.shape[2],
    ).transpose(1, 2)  # fmt: skip


def limits(head_width: int, dropout: float) -> tuple[str | None, str | None]:
    """Why attention with such heads and such dropout has no Triton form, and why no stock form; None where it has."""
    no_triton = no_torch = None
    if head_width > MAX_HEAD_WIDTH:
        no_triton = f"found heads of width {head_width}, expected at most {MAX_HEAD_WIDTH}: use impl=torch or reference"
    if dropout > 0:
        no_torch = (
            f"found dropout {dropout}, expected 0: the stock operator draws masks that depend on the "
            f"layout; use impl=auto, triton or reference"
        )
    return no_triton, no_torch


def check(q: Tensor, k: Tensor, v: Tensor, dropout: DropoutKey | None, samples: Tensor | None) -> None:
    """Raise KernelError unless the arguments of `attention` fit together."""
    found = f"attention: found q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    expect(
        q.dim() == 4 and k.dim() == 4 and k.shape == v.shape and q.shape[::3] == k.shape[::3],
        f"{found}, expected [B, Tq, H, D] and twice [B, Tk, K, D]",
    )
    expect(q.shape[2] % k.shape[2] == 0, f"{found}, expected H = {q.shape[2]} to be a multiple of K")
    expect(1 <= q.shape[1] <= k.shape[1], f"{found}, expected 1 <= Tq <= Tk")
    expect(
        q.dtype == k.dtype == v.dtype,
        f"attention: found {q.dtype}, {k.dtype}, {v.dtype}, expected one dtype: cast them alike",
    )
    if dropout is not None and dropout.p > 0:
        expect(
            samples is not None and samples.shape == q.shape[:1] and samples.dtype == torch.int64,
            f"attention: dropout expects samples, the {q.shape[0]} global sample numbers as int64",
        )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dropout: DropoutKey | None = None,
    samples: Tensor | None = None,
    head_offset: int = 0,
    impl: str = "auto",
) -> Tensor:
    """dropout(softmax(q k^T / sqrt(D) + causal mask)) v (Vaswani et al. 2017, eq. 1).

    q [B, Tq, H, D]; k, v [B, Tk, K, D], any strides; H a multiple of K: query head h uses key/value
    head h // (H / K). Query row i stands at position Tk - Tq + i and sees the keys up to it
    (decoding with a cache has Tq < Tk).
    dropout: drops weights by the mask keyed (sample, head, query position, key position), where
    `samples` int64 [B] are global sample numbers and head_offset is the global number of the first
    query head here.
    Returns [B, Tq, H, D] in the dtype of q. Differentiable once. impl: see kernels/dispatch.py.
    Raises KernelError on arguments that do not fit together or a form that cannot run.
    """
    check(q, k, v, dropout, samples)
    key = dropout if dropout is not None and dropout.p > 0 else None
    no_triton, no_torch = limits(q.shape[-1], 0.0 if key is None else key.p)
    form = choose(impl, "attention", device=q.device, dtype=q.dtype, no_triton=no_triton, no_torch=no_torch)
    if form == "torch":
        return stock(q, k, v)
    if form == "reference":
        return reference.attention(q, k, v, dropout=key, samples=samples, head_offset=head_offset)
    if key is None:
        return attention_op(q, k, v, None, 0.0, 0, 0, 0)[0]
    return attention_op(q, k, v, samples, key.p, key.seed, key.site, head_offset)[0]
