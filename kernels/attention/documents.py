"""Where the document of each token begins and ends: found once for a batch, and read by every layer."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import TRITON_DTYPES, cdiv, choose
from kernels.plan import Plan, planned
from kernels.registration import call, operator

TOKENS = 128  # of a program


@triton.jit(do_not_specialize=["documents", "steps", "T", "tokens"])
def document_bounds_kernel(cu_seqlens_ptr, bounds_ptr, documents, steps, T, tokens, BLOCK: tl.constexpr):
    """Write the first and last token of each token's document, int32 [2, B, T], relative to its row (maybe outside)."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low = tl.zeros((BLOCK,), tl.int32)
    high = low + documents
    for _ in range(steps):
        middle = (low + high) // 2
        begun = tl.load(cu_seqlens_ptr + middle) <= token
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle)
    row = token // T * T
    tl.store(bounds_ptr + token, tl.load(cu_seqlens_ptr + low) - row, token < tokens)
    tl.store(bounds_ptr + tokens + token, tl.load(cu_seqlens_ptr + low + 1) - row - 1, token < tokens)


@planned
def plan_of(T: int, tokens: int, device: torch.device) -> Plan:
    return Plan(document_bounds_kernel, cdiv(tokens, TOKENS), device, T, tokens, TOKENS)


@operator("document_bounds", fake=lambda cu_seqlens, B, T: cu_seqlens.new_empty(2, B, T))
def document_bounds_op(cu_seqlens: Tensor, B: int, T: int) -> Tensor:
    """What document_bounds_kernel writes."""
    bounds = torch.empty((2, B, T), dtype=torch.int32, device=cu_seqlens.device)
    documents = cu_seqlens.numel() - 1
    plan = plan_of(T, B * T, cu_seqlens.device)
    plan(cu_seqlens.contiguous(), bounds, numbers=(documents, documents.bit_length()))
    return bounds


def document_bounds(cu_seqlens: Tensor, B: int, T: int, *, impl: str = "auto") -> Tensor | None:
    """What calls of `attention` on the same rows can share: pass it beside their cu_seqlens. None if `impl` needs none.

    int32 [2, B, T]: the first and the last token of each token's document, counted from the token's row.
    """
    impl = "triton" if impl == "gluon" else impl  # which reads the same
    form = choose(impl, "attention", device=cu_seqlens.device, dtype=TRITON_DTYPES[0])
    return call(document_bounds_op, cu_seqlens, B, T) if form == "triton" else None
