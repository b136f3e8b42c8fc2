"""The public functions `attention` and `attention_with_lse`: they check arguments and choose the form that runs.

B batch, Tq queries, Tk keys, H query heads, K key/value heads, D head width.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import reference
from kernels.attention.backward import backward
from kernels.attention.documents import document_bounds_op
from kernels.attention.forward import forward
from kernels.attention.gluon import why_not_gluon
from kernels.attention.options import Options, Strided
from kernels.attention.reference import visible
from kernels.dispatch import KernelError, choose, expect
from kernels.philox import DropoutKey
from kernels.registration import call, operator

MAX_HEAD_WIDTH = 256  # one tile holds a head
MAX_HEADS = 256  # no model has more: they are positions, in the order of torch's operator


def limits(
    head_width: int, dropout: float, sparse: bool, softcap: float, lse: bool = False
) -> tuple[str | None, str | None]:
    """Why attention with such heads and options has no Triton form, and why no stock form; None where it has."""
    no_triton = no_torch = None
    if head_width > MAX_HEAD_WIDTH:
        no_triton = f"found heads of width {head_width}, expected at most {MAX_HEAD_WIDTH}: use impl=torch or reference"
    if dropout > 0:
        # torch.compile may hold p as a symbol, which it cannot write into a text.
        found = "dropout" if torch.compiler.is_compiling() else f"dropout {dropout}"
        no_torch = (
            f"found {found}, expected 0: the stock operator draws masks that depend on the layout; use impl=auto, "
            f"triton or reference"
        )
    missing = "a block-sparse pattern" if sparse else "softcap" if softcap > 0 else "lse" if lse else None
    if missing is not None:
        no_torch = f"found {missing} asked for, which the stock operator has not: use impl=auto, triton or reference"
    return no_triton, no_torch


def stock(q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """PyTorch's scaled_dot_product_attention, which takes [B, H, T, D]."""
    B, Tq, Tk = q.shape[0], q.shape[1], k.shape[1]
    bounded = (window is not None and window < Tk) or cu_seqlens is not None
    causal = 1 < Tq == Tk and not bounded
    unmasked = causal or (Tq == 1 and not bounded)  # one query sees every key; a mask would cost the fastest backends
    mask = None if unmasked else visible(B, Tq, Tk, window, None, cu_seqlens, q.device)[:, None]
    return F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        attn_mask=mask, is_causal=causal, enable_gqa=q.shape[2] != k.shape[2],
    ).transpose(1, 2)  # fmt: skip


def fit(Tq: int, H: int, Tk: int, K: int) -> bool:
    """Whether attention takes so many queries and keys, with so many heads each."""
    return 1 <= Tq <= Tk and 1 <= K <= H <= MAX_HEADS and H % K == 0


def check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    queries, keys = q.shape, k.shape
    ranked = len(queries) == len(keys) == 4 and keys == v.shape and queries[::3] == keys[::3]
    if ranked and fit(queries[1], queries[2], keys[1], keys[2]) and q.dtype == k.dtype == v.dtype:
        return
    found = f"attention: found q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    expect(ranked, f"{found}, expected [B, Tq, H, D] and twice [B, Tk, K, D]")
    (Tq, H), (Tk, K) = q.shape[1:3], k.shape[1:3]
    if not fit(Tq, H, Tk, K):
        order = "; these fit as [B, H, T, D], the order of torch's scaled_dot_product_attention: transpose(1, 2) each"
        hint = order if fit(H, Tq, K, Tk) else ""
        raise KernelError(f"{found}, expected 1 <= Tq <= Tk, and H, at most {MAX_HEADS}, a multiple of K{hint}")
    raise KernelError(f"attention: found {q.dtype}, {k.dtype}, {v.dtype}, expected one dtype: cast them alike")


def wrong_documents(cu_seqlens: Tensor, tokens: int) -> str | None:
    """Return what is wrong with the numbers in cu_seqlens, or None. Reads the tensor."""
    bounds = cu_seqlens.tolist()
    if bounds[0] == 0 and bounds[-1] == tokens and sorted(bounds) == bounds:
        return None
    shown = ", ".join(map(str, bounds[:8])) + ", ..." * (len(bounds) > 8)
    return f"found cu_seqlens [{shown}], expected numbers that ascend from 0 to B * T = {tokens}"


def wrong_options(
    q: Tensor, k: Tensor, window: int | None, sparse: Strided | None, cu_seqlens: Tensor | None, softcap: float,
    dropout: DropoutKey | None, samples: Tensor | None,
) -> str | None:  # fmt: skip
    """Return what is wrong with the other arguments, or None."""
    # Messages are formatted where they are needed: torch.compile cannot trace numbers that change into a string.
    (B, Tq), Tk = q.shape[:2], k.shape[1]
    if window is not None and window < 1:
        return f"found window = {window}, expected at least 1 key"
    if window is not None and sparse is not None:
        return f"found window = {window} and {sparse}, expected one of the two"
    if not 0 <= softcap < math.inf:
        return f"found softcap = {softcap}, expected a finite number, at least 0 (0: none)"
    fitting = samples is not None and samples.shape == q.shape[:1] and samples.dtype == torch.int64
    if dropout is not None and dropout.p > 0 and not fitting:
        return f"dropout expects samples, the {B} global sample numbers as int64"
    if cu_seqlens is None:
        return None
    if Tq != Tk:
        return f"found cu_seqlens with Tq = {Tq} and Tk = {Tk}, expected as many queries as keys"
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype != torch.int32:
        return f"found cu_seqlens {tuple(cu_seqlens.shape)} of {cu_seqlens.dtype}, expected int32 [documents + 1]"
    if cu_seqlens.device != q.device:
        return f"found cu_seqlens on {cu_seqlens.device}, expected it on {q.device}, where q is"
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        return wrong_documents(cu_seqlens, B * Tk)
    return None


# `attention`'s options as its operators take them. window 0: none; sparse: [] or [block, local, stride].
OPTIONS = (
    "Tensor? samples, Tensor? bounds, SymInt window, SymInt[] sparse, float softcap, float p, SymInt seed, "
    "SymInt site, SymInt head_offset, bool deterministic, bool gluon=False"
)


def options_of(
    window: int, sparse: Sequence[int], softcap: float, p: float, seed: int, site: int, head_offset: int,
    deterministic: bool, gluon: bool = False,
) -> Options:  # fmt: skip
    key = DropoutKey(p, seed, site) if p > 0 else None
    pattern = Strided(*sparse) if sparse else None
    return Options(window or None, pattern, softcap, key, head_offset, deterministic, gluon)


def _fake(q: Tensor, k: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    B, T, H = q.shape[:3]
    return q.new_empty(B, T, H, q.shape[-1]), q.new_empty((B, H, T), dtype=torch.float32)


def parts_of(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if k is None or v is None:
        q, k, v = q.unbind(3)
    return q, k, v


def _save(ctx, inputs, output) -> None:
    q, k, v, samples, bounds, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, samples, bounds)


def _backward(ctx, do, dlse):
    q, k, v, o, lse, samples, bounds = ctx.saved_tensors
    do = torch.zeros_like(o) if do is None else do
    return tuple(call(attention_backward_op, do, dlse, q, k, v, o, lse, samples, bounds, *ctx.options))


@operator(
    "attention",
    schema=f"(Tensor q, Tensor? k, Tensor? v, {OPTIONS}) -> (Tensor, Tensor)",
    fake=_fake,
    save=_save,
    backward=_backward,
)
def attention_op(
    q: Tensor, k: Tensor | None, v: Tensor | None, samples: Tensor | None, bounds: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    """(o [B, Tq, H, D], lse in base 2, fp32 [B, H, Tq]). q alone, [B, T, H, 3, D], is all three."""
    chosen = options_of(*options)
    if chosen.gluon:
        from kernels.attention.gluon.launch import forward as gluon_forward  # only here: an older Triton has no Gluon

        return gluon_forward(*parts_of(q, k, v), chosen, bounds)
    return forward(*parts_of(q, k, v), chosen, samples, bounds)


@operator(
    "attention_backward",
    schema=(f"(Tensor do, Tensor? dlse, Tensor q, Tensor? k, Tensor? v, Tensor o, Tensor lse, {OPTIONS}) -> Tensor[]"),
    fake=lambda do, dlse, *inputs: [x.new_empty(x.shape) for x in inputs[:3] if x is not None],
)
def attention_backward_op(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor | None, v: Tensor | None, o: Tensor, lse: Tensor,
    samples: Tensor | None, bounds: Tensor | None, *options: Any,
) -> list[Tensor]:  # fmt: skip
    """[dq, dk, dv], contiguous; of q alone [dq]."""
    chosen, packed = options_of(*options), k is None
    if chosen.gluon:
        from kernels.attention.gluon.backward import backward as gluon_backward  # only here: see attention_op

        return gluon_backward(do, dlse, *parts_of(q, k, v), o, lse, chosen, bounds, packed)
    return backward(do, dlse, *parts_of(q, k, v), o, lse, chosen, samples, bounds, packed=packed)


def _attention(
    heads: tuple[Any, ...], lse: bool = False, *, window: int | None = None, sparse: Strided | None = None,
    cu_seqlens: Tensor | None = None, bounds: Tensor | None = None, softcap: float = 0.0,
    dropout: DropoutKey | None = None, samples: Tensor | None = None, head_offset: int = 0, deterministic: bool = True,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(o, lse in natural logarithm; None if not asked for). heads: q, k and v, or one tensor of them and twice None."""
    q, k, v = parts_of(*heads)
    check_shapes(q, k, v)
    wrong = wrong_options(q, k, window, sparse, cu_seqlens, softcap, dropout, samples)
    if wrong is not None:
        raise KernelError(f"attention: {wrong}")
    key = dropout if dropout is not None and dropout.p > 0 else None
    no_triton, no_torch = limits(q.shape[-1], 0.0 if key is None else key.p, sparse is not None, softcap, lse)
    no_gluon = None
    if impl == "gluon":
        p = 0.0 if key is None else key.p
        decoding = q.shape[1] != k.shape[1]
        no_gluon = why_not_gluon(q.device, q.dtype, q.shape[-1], p, sparse is not None, softcap, decoding)
    limited = {"no_triton": no_triton, "no_torch": no_torch, "no_gluon": no_gluon}
    form = choose(impl, "attention", device=q.device, dtype=q.dtype, **limited)
    if form == "torch":
        return stock(q, k, v, window=window, cu_seqlens=cu_seqlens), None
    if form == "reference":
        options = {"window": window, "sparse": sparse, "cu_seqlens": cu_seqlens, "softcap": softcap}
        options |= {"dropout": key, "samples": samples, "head_offset": head_offset}
        o, log_sums = reference.attention_with_lse(q, k, v, **options)
        return o, log_sums if lse else None
    if cu_seqlens is not None and bounds is None:
        bounds = call(document_bounds_op, cu_seqlens, len(q), k.shape[1])
    pattern = [] if sparse is None else [sparse.block, sparse.local, sparse.stride]
    drop = (0.0, 0, 0, 0) if key is None else (key.p, key.seed, key.site, head_offset)
    rest = (samples if key else None, bounds, window or 0, pattern, float(softcap), *drop, deterministic)
    o, base_2 = call(attention_op, *heads, *rest, form == "gluon")
    return o, base_2 * math.log(2) if lse else None


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, sparse: Strided | None = None,
    cu_seqlens: Tensor | None = None, bounds: Tensor | None = None, softcap: float = 0.0,
    dropout: DropoutKey | None = None, samples: Tensor | None = None, head_offset: int = 0, deterministic: bool = True,
    impl: str = "auto",
) -> Tensor:  # fmt: skip
    """dropout(softmax(cap(q k^T / sqrt(D)) + mask)) v (Vaswani et al. 2017, eq. 1).

    q [B, Tq, H, D]; k, v [B, Tk, K, D], any strides: NOT the order of torch's scaled_dot_product_attention, which has
    positions and heads the other way round. H at most 256, a multiple of K: head h uses key/value head h // (H / K).
    Query row i stands at position Tk - Tq + i and sees the keys up to it (decoding with a cache has Tq < Tk), of those:
    window: the last `window` ones, its own among them (Beltagy et al. 2020).
    sparse: those of a block-sparse pattern; not together with window.
    cu_seqlens: int32 [documents + 1] on the device of q, ascending from 0 to B * T: where documents begin in the B * T
    tokens, for Tq = Tk = T. A query sees its own document; rows end documents too. Documents may be empty. The numbers
    are checked on a CPU only: on a GPU that would wait for it. bounds: document_bounds(cu_seqlens, B, T), which calls
    on the same rows can share; found here if None.
    softcap: cap(s) = softcap * tanh(s / softcap), 0 for none (Gemma 2, 2024).
    dropout: drops weights by the mask keyed (sample, head, query position, key position), where `samples` int64 [B] are
    global sample numbers and head_offset is the global number of this rank's first query head.
    deterministic: gradients have the same bits on every run; False sums dq in any order, with fewer operations.
    Returns [B, Tq, H, D] in the dtype of q. Differentiable once. impl: see kernels/dispatch.py; the stock operator has
    no sparse, softcap or dropout. gluon: on a Hopper GPU, for bf16 and fp16, D 64 and 128, Tq = Tk, and none of these
    three. Raises KernelError on arguments that do not fit together or a form that cannot run.
    """
    return _attention(
        (q, k, v), window=window, sparse=sparse, cu_seqlens=cu_seqlens, bounds=bounds, softcap=softcap, dropout=dropout,
        samples=samples, head_offset=head_offset, deterministic=deterministic, impl=impl,
    )[0]  # fmt: skip


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Return attention(...) and lse fp32 [B, H, Tq], the natural log-sum-exp of each query's scores before dropout."""
    o, lse = _attention((q, k, v), lse=True, **options)
    assert lse is not None
    return o, lse


def attention_packed(qkv: Tensor, **options: Any) -> Tensor:
    """Return attention(*qkv.unbind(3), **options) of qkv [B, T, H, 3, D]: the same bits, its gradient in one piece."""
    return _attention((qkv, None, None), **options)[0]
