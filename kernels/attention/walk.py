"""Which tile a program owns, and which tiles it visits.

Positions count keys: query row r is at position r + Tk - Tq. Tiles of queries begin at `origin` + multiples of
BLOCK_M. The origin is row 0 or, with a block-sparse pattern, a multiple of BLOCK_M, so that no tile lies in two blocks.
Rows before row 0 are then padding, as are rows after the last.

BOUNDED: windows and documents set bounds, the first key that a query sees. From one query to the next this key never
moves back, so the first and the last query of a tile give the keys that some, and that all, of its queries see.
"""

import triton
import triton.language as tl


@triton.jit
def tile_and_head(tiles, section):
    """Return (tile, head) of this program. Heads run in sections that fit the L2 cache: tile 0 of each, then tile 1."""
    heads = tl.num_programs(0) // tiles
    first = tl.program_id(0) // (tiles * section) * section
    size = tl.minimum(section, heads - first)
    number = tl.program_id(0) - first * tiles
    return number // size, first + number % size


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
