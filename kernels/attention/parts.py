"""Parts that the attention kernels share: the order of programs, loads and stores, and the tiles to visit.

Positions count keys: query row r is at position r + Tk - Tq. Tiles of queries begin at `origin` + multiples of
BLOCK_M. The origin is row 0 or, with a block-sparse pattern, a multiple of BLOCK_M, so that no tile lies in two blocks.
Rows before row 0 are then padding, as are rows after the last.

BOUNDED: windows and documents set bounds, the first key that a query sees. From one query to the next this key never
moves back, so the first and the last query of a tile give the keys that some, and that all, of its queries see.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import cdiv, launch

DOCUMENT_TOKENS = 128  # of a program of the kernel that finds documents' bounds

# Stands for minus infinity where a row may meet tiles of which it sees nothing: differences stay finite, and what such
# a tile added is multiplied by zero once the row sees a key.
UNSEEN = tl.constexpr(-1e38)
# Which rows of a tile may lie outside of the tensor.
INSIDE = tl.constexpr(0)
MAY_END = tl.constexpr(1)
MAY_BEGIN = tl.constexpr(2)  # or end


@triton.jit
def tile_and_head(tiles, section):
    """Return (tile, head) of this program. Heads run in sections that fit the L2 cache: tile 0 of each, then tile 1."""
    heads = tl.num_programs(0) // tiles
    first = tl.program_id(0) // (tiles * section) * section
    size = tl.minimum(section, heads - first)
    number = tl.program_id(0) - first * tiles
    return number // size, first + number % size


@triton.jit
def head_of(x, stride_b, stride_t, stride_h, b, h, TMA: tl.constexpr):
    """Head h of sample b of x as load_tile takes it. x: a descriptor of [B, H, T, D] or a pointer to [B, T, H, D]."""
    if not TMA:
        x += tl.cast(b, tl.int64) * stride_b + tl.cast(h, tl.int64) * stride_h
    return x, stride_t, b, h


@triton.jit
def load_tile(
    head, first, limit, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, CHECK: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Rows first to first + ROWS - 1 of the `limit` of a head, padded with zeros to [ROWS, WIDTH]."""
    x, stride, b, h = head
    if TMA:
        tile = tl.reshape(x.load([b, h, first, 0]), (ROWS, WIDTH))
    else:
        rows = tl.arange(0, ROWS)
        cols = tl.arange(0, WIDTH)
        # The 64-bit product is one scalar; the offsets inside the tile fit 32 bits.
        ptrs = x + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + cols[None, :]
        if CHECK != INSIDE:
            tile = tl.load(ptrs, inside(first, limit, D, ROWS, WIDTH, CHECK), 0.0)
        elif WIDTH != D:
            tile = tl.load(ptrs, cols[None, :] < D, 0.0)
        else:
            tile = tl.load(ptrs)
    return tile


@triton.jit
def store_tile(
    ptr, stride, first, limit, tile, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Store what of `tile` [ROWS, WIDTH] lies inside the [limit, D] matrix, from its row `first` on."""
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, WIDTH)
    ptrs = ptr + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + cols[None, :]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), inside(first, limit, D, ROWS, WIDTH, CHECK))


@triton.jit
def inside(first, limit, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, CHECK: tl.constexpr):
    """Which elements of a tile that begins at row `first` lie inside a [limit, D] matrix."""
    rows = tl.arange(0, ROWS)[:, None]
    within = (rows < limit - first) & (tl.arange(0, WIDTH)[None, :] < D)
    if CHECK == MAY_BEGIN:
        within &= rows >= -first
    return within


@triton.jit
def rows_inside(first, limit, ROWS: tl.constexpr, CHECK: tl.constexpr):
    """(row numbers, which of them are in 0 to limit - 1) of a tile that begins at row `first`."""
    rows = first + tl.arange(0, ROWS)
    within = rows < limit
    if CHECK == MAY_BEGIN:
        within &= rows >= 0
    return rows, within


@triton.jit
def tanh_of_half(x):
    """tanh(x ln(2) / 2), from one exp2. Past 64 it is 1 in fp32, and exp2 stays finite."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(tl.minimum(x, 64.0)))


@triton.jit
def first_key(starts_ptr, window, b, T, positions):
    """The first key that the queries at `positions`, a number or a block, see by window and document."""
    first = tl.maximum(positions - window + 1, 0)
    if starts_ptr is not None:
        first = tl.maximum(first, tl.load(starts_ptr + tl.cast(b, tl.int64) * T + tl.minimum(positions, T - 1)))
    return first


@triton.jit
def last_query(ends_ptr, window, b, T, keys):
    """The position of the last query that sees `keys`, a number or a block, by window and document."""
    last = tl.minimum(keys + window, T) - 1
    if ends_ptr is not None:
        last = tl.minimum(last, tl.load(ends_ptr + tl.cast(b, tl.int64) * T + tl.minimum(keys, T - 1)))
    return last


@triton.jit
def keys_seen(
    starts_ptr, window, b, position, Tk, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BOUNDED: tl.constexpr,
    SPARSE: tl.constexpr, LOCAL: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """What the tile of queries at `position` sees, as steps of BLOCK_N in a walk that `key_of` maps to keys:
    (begin, near, full, diagonal, end, block), the keys themselves from `near` on, and the strided blocks before it.

    From `full` to `diagonal` all rows see all keys, but for keys that the walk leaves out; `block` is the first strided
    block.
    """
    end = tl.minimum(position + BLOCK_M, Tk)
    near = 0
    full = 0
    if BOUNDED:
        near = first_key(starts_ptr, window, b, Tk, position)
        full = first_key(starts_ptr, window, b, Tk, end - 1)
    begin = near // BLOCK_N * BLOCK_N
    block = 0
    if SPARSE:
        own = position // SPARSE
        block = own % STRIDE + tl.cdiv(tl.maximum(near // SPARSE - own % STRIDE, 0), STRIDE) * STRIDE
        blocks = tl.maximum(own - LOCAL - block + STRIDE, 0) // STRIDE
        near = tl.maximum(begin, tl.maximum(own - LOCAL + 1, 0) * SPARSE)
        begin = near - blocks * SPARSE
    else:
        near = begin
    return begin, near, full, (position + 1) // BLOCK_N * BLOCK_N, end, block


@triton.jit
def key_of(step, begin, near, block, SPARSE: tl.constexpr, STRIDE: tl.constexpr):
    """The key where `step` of the walk that keys_seen describes begins."""
    key = step
    if SPARSE:
        past = step - begin
        key = tl.where(step < near, (block + past // SPARSE * STRIDE) * SPARSE + past % SPARSE, step)
    return key


@triton.jit
def queries_seeing(
    ends_ptr, window, b, key, origin, Tk, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BOUNDED: tl.constexpr,
    SPARSE: tl.constexpr, LOCAL: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """Who sees the tile of keys at `key`, as steps of BLOCK_M in a walk that `query_of` maps to positions:
    (begin, far, end, full, block), the positions themselves up to `far`, and the strided blocks from there on.

    Positions from key + BLOCK_N - 1 to `full` see all keys of the tile; `block` is the first strided block.
    """
    last = Tk - 1
    full = Tk
    if BOUNDED:
        last = last_query(ends_ptr, window, b, Tk, tl.minimum(key + BLOCK_N, Tk) - 1)
        full = last_query(ends_ptr, window, b, Tk, key) + 1
    begin = origin + tl.maximum(key - origin, 0) // BLOCK_M * BLOCK_M
    far = last + 1
    end = far
    block = 0
    if SPARSE:
        own = key // SPARSE
        far = tl.minimum(far, (own + LOCAL) * SPARSE)
        far = begin + tl.cdiv(tl.maximum(far - begin, 0), BLOCK_M) * BLOCK_M
        hops = tl.maximum((LOCAL + STRIDE - 1) // STRIDE, tl.cdiv(tl.maximum(origin // SPARSE - own, 0), STRIDE))
        block = own + hops * STRIDE
        end = far + tl.maximum(last // SPARSE - block + STRIDE, 0) // STRIDE * SPARSE
    return begin, far, end, full, block


@triton.jit
def query_of(step, far, block, SPARSE: tl.constexpr, STRIDE: tl.constexpr):
    """The position where `step` of the walk that queries_seeing describes begins."""
    position = step
    if SPARSE:
        past = step - far
        position = tl.where(step < far, step, (block + past // SPARSE * STRIDE) * SPARSE + past % SPARSE)
    return position


@triton.jit(do_not_specialize=["documents", "steps", "T", "tokens"])
def document_bounds_kernel(
    cu_seqlens_ptr, starts_ptr, ends_ptr, documents, steps, T, tokens, BLOCK: tl.constexpr
):  # fmt: skip
    """Write the first and last token of each token's document, int32 [B, T], relative to its row (maybe outside)."""
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
