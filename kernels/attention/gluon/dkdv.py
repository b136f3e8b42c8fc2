"""The gradients of keys and values on Hopper: one program computes them for the keys of CONSUMERS tiles of N.

The producer copies tiles of M queries with their dO, lse and delta, head after head of those that share the keys. A
consumer owns N keys. Its scores stand transposed, [keys, queries], so that P and dS are left operands in registers.
The softmax runs beside dP = V dO^T, and the product dV = P dO beside what makes dS of dP. In between the other
consumer's products keep the tensor cores busy: registers do not suffice for two tiles in flight.
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
from kernels.attention.walk import last_query, queries_seeing, tile_and_head

CONSUMERS = gl.constexpr(2)


@gluon.jit
def produce(inputs, memory, place, R, M: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr):
    """Copy all keys and values, and R times, for each query head, the tiles of queries from `begin` to `end`."""
    q_desc, k_desc, v_desc, do_desc, rows_desc = inputs
    k_s, v_s, kv_full, queries, do_s, rows_s, _ = memory
    b, kv_head, key, begin, end, _ = place
    q_s, full, empty = queries
    for c in gl.static_range(CONSUMERS):
        mbarrier.expect(kv_full.index(c), 2 * k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k_desc, [b, kv_head, key + c * N, 0], kv_full.index(c), k_s.index(c))
        tma.async_copy_global_to_shared(v_desc, [b, kv_head, key + c * N, 0], kv_full.index(c), v_s.index(c))
    i = 0
    for h in range(kv_head * R, kv_head * R + R):
        for row in range(begin, end, M):
            s = i % STAGES
            mbarrier.wait(empty.index(s), i // STAGES % 2 ^ 1)
            mbarrier.expect(full.index(s), 2 * q_desc.block_type.nbytes + rows_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(q_desc, [b, h, row, 0], full.index(s), q_s.index(s))
            tma.async_copy_global_to_shared(do_desc, [b, h, row, 0], full.index(s), do_s.index(s))
            tma.async_copy_global_to_shared(rows_desc, [b, h, 0, row], full.index(s), rows_s.index(s))
            i += 1


@gluon.jit
def weights(scores, columns_s, row, full, highs, M: gl.constexpr, N: gl.constexpr, BOUNDED: gl.constexpr):
    """2^scores [N, M] of the queries from `row` on, 0 where a query does not see a key. Rows count from the first key.

    full: rows from N - 1 to before it see all keys. highs: the last row that sees each key.
    """
    partial = row < N - 1
    if BOUNDED:
        partial |= row + M > full
    if partial:
        keys = gl.arange(0, N, layout=gl.SliceLayout(1, scores.type.layout))
        # Numbers that arange gives would stay in registers through the whole loop.
        columns = columns_s.load(scores.type.layout)
        seen = columns >= (keys - row)[:, None]
        if BOUNDED:
            seen &= columns <= (highs - row)[:, None]
        scores = gl.where(seen, scores, float("-inf"))
    return gl.exp2(scores)


@gluon.jit
def consume(
    outputs, memory, place, ends_ptr, T, R, window, scale, grad_scale,
    C: gl.constexpr, M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, BOUNDED: gl.constexpr,
):  # fmt: skip
    """Write dk and dv of the N keys of consumer C."""
    k_s, v_s, kv_full, queries, do_s, rows_s, columns_s = memory
    b, kv_head, key, begin, end, full = place
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    dtype: gl.constexpr = k_s.dtype
    first = key + C * N
    highs = gl.arange(0, N, layout=gl.SliceLayout(1, S_LAYOUT))
    if BOUNDED:
        highs = last_query(ends_ptr, window, b, T, first + highs) - first
    k = k_s.index(C).reshape((N, D))
    v = v_s.index(C).reshape((N, D))
    zero = gl.zeros((N, M), gl.float32, S_LAYOUT)
    dk = gl.zeros((N, D), gl.float32, O_LAYOUT)
    dv = gl.zeros((N, D), gl.float32, O_LAYOUT)
    n = gl.cdiv(end - begin, M)
    end -= first  # from here on rows count from the consumer's first key
    begin -= first
    full -= first
    row = begin

    mbarrier.wait(kv_full.index(C), 0)
    for i in range(n * R):
        await_tile(queries, i, STAGES)
        if row > -M:  # else none sees a key
            q = tile_of(queries, i, M, D, STAGES)
            do = do_s.index(i % STAGES).reshape((M, D))
            rows = rows_s.index(i % STAGES).reshape((2, M))
            scores = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
            dp = warpgroup_mma(v, do.permute((1, 0)), zero, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(1, deps=(scores,))
            p = weights(scores * scale - rows.slice(0, 1).load(S_LAYOUT), columns_s, row, full, highs, M, N, BOUNDED)
            p16 = gl.convert_layout(p.to(dtype), P_LAYOUT)
            dv = warpgroup_mma(p16, do, dv, is_async=True)
            dp = warpgroup_mma_wait(1, deps=(dp,))
            ds = gl.convert_layout((p * (dp - rows.slice(1, 1).load(S_LAYOUT))).to(dtype), P_LAYOUT)
            dk = warpgroup_mma(ds, q, dk, is_async=True)
            dk, dv, p16, ds = warpgroup_mma_wait(0, deps=(dk, dv, p16, ds))
        release(queries, i, STAGES)
        row = gl.where(row + M < end, row + M, begin)

    dk_desc, dv_desc = outputs
    k.store((dk * grad_scale).to(dtype))  # the keys and values have been read
    v.store(dv.to(dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(dk_desc, [b, kv_head, first, 0], k_s.index(C))  # which leaves out rows from T on
    tma.async_copy_shared_to_global(dv_desc, [b, kv_head, first, 0], v_s.index(C))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["T", "section", "window"])
def gluon_dkdv_kernel(
    q_desc, k_desc, v_desc, do_desc, rows_desc, dk_desc, dv_desc, ends_ptr,
    T, H, R, section, window, scale, grad_scale,
    M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, BOUNDED: gl.constexpr,
):  # fmt: skip
    """Write dk and dv of CONSUMERS N keys of one key/value head, summed over its R query heads in their order.

    Descriptors are of [B, heads, T, D]; that of rows, what attention_delta_kernel writes, is of fp32 [B, H, 2, length].
    ends: int32 [B, T], the last token of each token's document, or None.
    BOUNDED: whether there are documents or a window; else `window` is T.
    """
    # Keys early in the sequence are seen by the most queries: the longest start first.
    tile, head = tile_and_head(gl.cdiv(T, CONSUMERS * N), section)
    b = head // (H // R)
    kv_head = head % (H // R)
    key = tile * CONSUMERS * N
    begin, _, end, full, _ = queries_seeing(ends_ptr, window, b, key, 0, T, M, CONSUMERS * N, BOUNDED, 0, 1, 1)
    k_s = gl.allocate_shared_memory(k_desc.dtype, [CONSUMERS, 1, 1, N, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(k_desc.dtype, [CONSUMERS, 1, 1, N, D], k_desc.layout)
    kv_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    for c in gl.static_range(CONSUMERS):
        mbarrier.init(kv_full.index(c), count=1)
    queries = ring(q_desc, M, D, STAGES, CONSUMERS)
    do_s = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, M, D], q_desc.layout)
    rows_s = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 1, 2, M], rows_desc.layout)
    columns_s = gl.allocate_shared_memory(gl.int32, [1, M], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    COLUMNS: gl.constexpr = gl.SliceLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16]))
    columns_s.store(gl.arange(0, M, layout=COLUMNS)[None, :])
    inputs = (q_desc, k_desc, v_desc, do_desc, rows_desc)
    outputs = (dk_desc, dv_desc)
    memory = (k_s, v_s, kv_full, queries, do_s, rows_s, columns_s)
    place = (b, kv_head, key, begin, end, full)
    gl.warp_specialize([
        (consume, (outputs, memory, place, ends_ptr, T, R, window, scale, grad_scale, 0, M, N, D, STAGES, BOUNDED)),
        (consume, (outputs, memory, place, ends_ptr, T, R, window, scale, grad_scale, 1, M, N, D, STAGES, BOUNDED)),
        (produce, (inputs, memory, place, R, M, N, STAGES)),
    ], [4, 1], [240, 24])  # fmt: skip
