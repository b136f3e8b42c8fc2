"""How the attention kernels load and store tiles."""

import triton
import triton.language as tl

# Stands for minus infinity where a row may meet tiles of which it sees nothing: differences stay finite, and what such
# a tile added is multiplied by zero once the row sees a key. A power of two, whose product with any scale is exact.
UNSEEN = tl.constexpr(-(2.0**126))
# Which rows of a tile may lie outside of the tensor.
INSIDE = tl.constexpr(0)
MAY_END = tl.constexpr(1)
MAY_BEGIN = tl.constexpr(2)  # or end


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
def load_rows(ptr, first, limit, outside, ROWS: tl.constexpr, CHECK: tl.constexpr):
    """Elements first to first + ROWS - 1 of the `limit` of a vector, which is padded with `outside` to whole tiles."""
    if CHECK == MAY_BEGIN:
        rows = first + tl.arange(0, ROWS)
        return tl.load(ptr + rows, (rows >= 0) & (rows < limit), outside)
    # No mask: so loads of 16 bytes serve four rows each.
    return tl.load(ptr + tl.multiple_of(first, ROWS) + tl.arange(0, ROWS))
