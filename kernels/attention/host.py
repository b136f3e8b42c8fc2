"""What the launches of the attention kernels share on the host: options, scalars, descriptors, document bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.attention.pattern import Strided
from kernels.attention.tiles import Tile, l2_bytes, tile_width
from kernels.dispatch import cdiv, interpretable, launch
from kernels.philox import DropoutKey, signed

LOG2_E = math.log2(math.e)
DOCUMENT_TOKENS = 128  # of a program of the kernel that finds documents' bounds


@dataclass(frozen=True)
class Options:
    """The arguments of `attention` that are not tensors. softcap 0: none."""

    window: int | None = None
    sparse: Strided | None = None
    softcap: float = 0.0
    key: DropoutKey | None = None
    head_offset: int = 0
    deterministic: bool = True


def scalars(options: Options, D: int, Tk: int) -> tuple[int, float, float, float, int, int, int, int]:
    """(window, scale, cap, 1 / (1 - p), seed, site, threshold, head_offset) as the kernels take them.

    scale: of q k^T to a score in base 2, or with softcap to the argument of tanh_of_half, whose value times cap is it.
    """
    window = Tk if options.window is None else min(options.window, Tk)
    scale, cap = LOG2_E / math.sqrt(D), LOG2_E * options.softcap
    if options.softcap > 0:
        scale *= 2 / options.softcap
    key = options.key
    if key is None:
        return window, scale, cap, 1.0, 0, 0, 0, 0
    seed, site, threshold = signed(key.seed), signed(key.site), signed(key.threshold)
    return window, scale, cap, 1 / (1 - key.p), seed, site, threshold, options.head_offset


def flags(options: Options, cu_seqlens: Tensor | None) -> tuple[bool, bool, bool, int, int, int]:
    """DROPOUT, SOFTCAP, BOUNDED, SPARSE (the block, 0 if dense), LOCAL, STRIDE."""
    dropout, softcap = options.key is not None, options.softcap > 0
    bounded = options.window is not None or cu_seqlens is not None
    if options.sparse is None:
        return dropout, softcap, bounded, 0, 1, 1
    return dropout, softcap, bounded, options.sparse.block, options.sparse.local, options.sparse.stride


def origin_of(Tq: int, Tk: int, options: Options, tile: Tile) -> int:
    """The position where the first tile of queries begins (kernels/attention/parts.py)."""
    first = Tk - Tq
    return first if options.sparse is None else first // tile.block_m * tile.block_m


def section_of(x: Tensor, head_bytes: int, group: int) -> int:
    """How many heads run together, a multiple of `group`: those whose `head_bytes` fit the L2 cache of x's device."""
    fit = max(1, l2_bytes(x.device) // max(1, head_bytes))
    return (1 << (fit.bit_length() - 1)) * group


def describable(*inputs: Tensor) -> bool:
    """Whether TMA descriptors can stand for tensors [B, T, H, D] as they lie in memory."""
    return all(
        x.shape[-1] == tile_width(x.shape[-1]) and x.numel() > 0 and x.data_ptr() % 16 == 0 and x.stride(-1) == 1
        and all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in x.stride()[:3])
        for x in inputs
    )  # fmt: skip


def loadable(*inputs: Tensor) -> tuple[Tensor, ...]:
    """The inputs as the kernels may load them: copies of those whose last stride is not 1."""
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in interpretable(*inputs))


def sources(tile: Tile, *inputs: tuple[Tensor, int]) -> tuple[list[Tensor | TensorDescriptor], list[int]]:
    """(what the kernels load each input [B, T, H, D] from, three strides of each). inputs: each with the rows of its
    tiles; TMA descriptors can stand for them if the tile has `tma`.
    """
    views = [x for x, _ in inputs]
    strides = [stride for view in views for stride in view.stride()[:3]]
    if not tile.tma:
        return list(views), strides
    # The sides of length 1 stand first: only then does Triton copy tiles straight to where the products read them.
    heads_first = [view.transpose(1, 2) for view in views]
    described: list[Tensor | TensorDescriptor] = [
        TensorDescriptor(view, list(view.shape), list(view.stride()), [1, 1, rows, view.shape[3]])
        for view, (_, rows) in zip(heads_first, inputs, strict=True)
    ]
    return described, strides


@triton.jit(do_not_specialize=["documents", "steps", "T", "tokens"])
def document_bounds_kernel(
    cu_seqlens_ptr, starts_ptr, ends_ptr, documents, steps, T, tokens, BLOCK: tl.constexpr
):  # fmt: skip
    """starts, ends int32 [B, T]: the first and the last token of each token's document, counted from where the token's
    row begins; outside of the row if the document goes on there. A binary search of cu_seqlens [documents + 1].
    """
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low = tl.zeros((BLOCK,), tl.int32)
    high = low + documents
    for _ in range(steps):
        middle = (low + high) // 2
        begun = tl.load(cu_seqlens_ptr + middle) <= token
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle)
    row = token // T * T
    tl.store(starts_ptr + token, tl.load(cu_seqlens_ptr + low) - row, token < tokens)
    tl.store(ends_ptr + token, tl.load(cu_seqlens_ptr + low + 1) - row - 1, token < tokens)


def document_bounds(cu_seqlens: Tensor | None, B: int, T: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """(starts, ends) int32 [B, T] as document_bounds_kernel gives them."""
    if cu_seqlens is None:
        return None, None
    cu_seqlens = cu_seqlens.contiguous()
    documents = cu_seqlens.numel() - 1
    starts, ends = (torch.empty((B, T), dtype=torch.int32, device=cu_seqlens.device) for _ in range(2))
    launch(
        document_bounds_kernel, cdiv(B * T, DOCUMENT_TOKENS), cu_seqlens.device,
        cu_seqlens, starts, ends, documents, documents.bit_length(), T, B * T, DOCUMENT_TOKENS,
    )  # fmt: skip
    return starts, ends


def wrong_documents(cu_seqlens: Tensor, tokens: int) -> str | None:
    """What is wrong with the numbers in cu_seqlens, or None. Reads the tensor."""
    bounds = cu_seqlens.tolist()
    if bounds[0] == 0 and bounds[-1] == tokens and sorted(bounds) == bounds:
        return None
    shown = ", ".join(map(str, bounds[:8])) + ", ..." * (len(bounds) > 8)
    return f"found cu_seqlens [{shown}], expected numbers that ascend from 0 to B * T = {tokens}"
