"""The gradient of queries on Hopper: one program computes it for the queries of CONSUMERS tiles of M of one head.

The producer copies tiles of N keys and values. A consumer owns M queries, with two tiles in flight: Q K^T and dO V^T of
the next one run beside the softmax of this one and beside what makes dS, the left operand of dQ = dS K in registers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.attention.gluon.parts import await_tile, release, ring, tile_of
from kernels.attention.walk import first_key, tile_and_head

CONSUMERS = gl.constexpr(2)


@gluon.jit
def produce(inputs, memory, place, R, M: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr):
    """Copy all queries with their dO, and the tiles of keys and values from `begin` to `end`."""
    q_desc, k_desc, v_desc, do_desc = inputs
    q_s, do_s, q_full, keys, v_s = memory
    b, h, row, begin, end = place
    k_s, full, empty = keys
    for c in gl.static_range(CONSUMERS):
        mbarrier.expect(q_full.index(c), 2 * q_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(q_desc, [b, h, row + c * M, 0], q_full.index(c), q_s.index(c))
        tma.async_copy_global_to_shared(do_desc, [b, h, row + c * M, 0], q_full.index(c), do_s.index(c))
    for i in range(gl.cdiv(end - begin, N)):
        s = i % STAGES
        mbarrier.wait(empty.index(s), i // STAGES % 2 ^ 1)
        mbarrier.expect(full.index(s), 2 * k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k_desc, [b, h // R, begin + i * N, 0], full.index(s), k_s.index(s))
        tma.async_copy_global_to_shared(v_desc, [b, h // R, begin + i * N, 0], full.index(s), v_s.index(s))


@gluon.jit
def weights(scores, key, full, rows, lows, first, N: gl.constexpr, BOUNDED: gl.constexpr):
    """2^scores [M, N] of the keys from `key` on; 0 where a query does not see a key."""
    p = gl.exp2(scores)
    partial = key + N - 1 > first
    if BOUNDED:
        partial |= key < full
    if partial:
        columns = key + gl.arange(0, N, layout=gl.SliceLayout(0, scores.type.layout))
        seen = columns[None, :] <= rows[:, None]
        if BOUNDED:
            seen &= columns[None, :] >= lows[:, None]
        p = gl.where(seen, p, 0.0)
    return p


@gluon.jit
def consume(
    memory, place, dq_desc, rows_ptr, length, starts_ptr, T, H, window, scale, grad_scale,
    C: gl.constexpr, M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, BOUNDED: gl.constexpr,
):  # fmt: skip
    """Write dq of the M queries of consumer C."""
    q_s, do_s, q_full, keys, v_s = memory
    b, h, row, begin, _ = place
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    dtype: gl.constexpr = q_s.dtype
    first = row + C * M
    rows = first + gl.arange(0, M, layout=gl.SliceLayout(1, S_LAYOUT))
    lows = rows
    full = 0
    if BOUNDED:
        lows = first_key(starts_ptr, window, b, T, rows)
        full = first_key(starts_ptr, window, b, T, gl.minimum(first + M, T) - 1)
    rows_head = rows_ptr + gl.cast(b * H + h, gl.int64) * 2 * length + rows
    lse = gl.load(rows_head)
    delta = gl.load(rows_head + length)
    q = q_s.index(C).reshape((M, D))
    do = do_s.index(C).reshape((M, D))
    zero = gl.zeros((M, N), gl.float32, S_LAYOUT)
    dq = gl.zeros((M, D), gl.float32, O_LAYOUT)
    n = gl.cdiv(gl.minimum(first + M, T) - begin, N)

    mbarrier.wait(q_full.index(C), 0)
    await_tile(keys, 0, STAGES)
    k = tile_of(keys, 0, N, D, STAGES)
    scores = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    dp = warpgroup_mma(do, v_s.index(0).reshape((N, D)).permute((1, 0)), zero, use_acc=False, is_async=True)
    scores, dp = warpgroup_mma_wait(0, deps=(scores, dp))
    p = weights(scores * scale - lse[:, None], begin, full, rows, lows, first, N, BOUNDED)
    ds = p * (dp - delta[:, None])
    await_tile(keys, 1, STAGES, n > 1)
    for i in range(1, n):
        ds16 = gl.convert_layout(ds.to(dtype), P_LAYOUT)
        k = tile_of(keys, i, N, D, STAGES)
        v = v_s.index(i % STAGES).reshape((N, D))
        scores = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
        dp = warpgroup_mma(do, v.permute((1, 0)), zero, use_acc=False, is_async=True)
        dq = warpgroup_mma(ds16, tile_of(keys, i - 1, N, D, STAGES), dq, is_async=True)
        scores = warpgroup_mma_wait(2, deps=(scores,))
        p = weights(scores * scale - lse[:, None], begin + i * N, full, rows, lows, first, N, BOUNDED)
        dp = warpgroup_mma_wait(1, deps=(dp,))
        ds = p * (dp - delta[:, None])
        # A branch between the softmax and the wait: inside one basic block ptxas moves the wait above the softmax.
        await_tile(keys, i + 1, STAGES, i + 1 < n)
        dq, ds, ds16 = warpgroup_mma_wait(0, deps=(dq, ds, ds16))
        release(keys, i - 1, STAGES)
    ds16 = gl.convert_layout(ds.to(dtype), P_LAYOUT)
    dq = warpgroup_mma(ds16, tile_of(keys, n - 1, N, D, STAGES), dq, is_async=True)
    dq, ds16 = warpgroup_mma_wait(0, deps=(dq, ds16))

    q.store((dq * grad_scale).to(dtype))  # the queries have been read
    fence_async_shared()
    tma.async_copy_shared_to_global(dq_desc, [b, h, first, 0], q_s.index(C))  # which leaves out rows from T on
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["T", "section", "window"])
def gluon_dq_kernel(
    q_desc, k_desc, v_desc, do_desc, dq_desc, rows_ptr, starts_ptr,
    length, T, H, R, section, window, scale, grad_scale,
    M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, BOUNDED: gl.constexpr,
):  # fmt: skip
    """Write dq of CONSUMERS M queries of one head. Descriptors are of [B, heads, T, D].

    rows: fp32 [B, H, 2, length], what attention_delta_kernel writes; length is a multiple of CONSUMERS M.
    starts: int32 [B, T], the first token of each token's document, or None.
    BOUNDED: whether there are documents or a window; else `window` is T.
    """
    gl.static_assert(STAGES >= 3, "a consumer waits for tile i + 1 before it releases tile i - 1")
    tiles = gl.cdiv(T, CONSUMERS * M)
    tile, head = tile_and_head(tiles, section)
    b = head // H
    h = head % H
    row = (tiles - 1 - tile) * CONSUMERS * M  # the last tile has the most keys: the longest start first
    begin = 0
    if BOUNDED:
        begin = first_key(starts_ptr, window, b, T, row) // N * N
    end = gl.minimum(row + CONSUMERS * M, T)
    q_s = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 1, M, D], q_desc.layout)
    do_s = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 1, M, D], q_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    for c in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(c), count=1)
    keys = ring(k_desc, N, D, STAGES, CONSUMERS)
    v_s = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, N, D], k_desc.layout)
    inputs = (q_desc, k_desc, v_desc, do_desc)
    memory = (q_s, do_s, q_full, keys, v_s)
    place = (b, h, row, begin, end)
    gl.warp_specialize([
        (consume, (memory, place, dq_desc, rows_ptr, length, starts_ptr, T, H, window, scale, grad_scale,
                   0, M, N, D, STAGES, BOUNDED)),
        (consume, (memory, place, dq_desc, rows_ptr, length, starts_ptr, T, H, window, scale, grad_scale,
                   1, M, N, D, STAGES, BOUNDED)),
        (produce, (inputs, memory, place, R, M, N, STAGES)),
    ], [4, 1], [240, 24])  # fmt: skip
