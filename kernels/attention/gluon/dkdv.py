"""The gradients of keys and values on Hopper: one program computes them for one tile of keys of one key/value head.

A producer warp copies tiles of queries into a ring of STAGES slots. Each of CONSUMERS warpgroups owns N keys of the
tile. Its scores stand transposed, [keys, queries], so that P and dS are left operands in registers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from kernels.attention.walk import last_query, queries_seeing, tile_and_head


@gluon.jit
def produce(
    descriptors, memory, barriers, b, kv_head, key, begin, end, R,
    M: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    """Copy each consumer's keys and values, then all tiles of queries of R heads, as slots become free."""
    q_desc, k_desc, v_desc, do_desc, rows_desc = descriptors
    q_s, k_s, v_s, do_s, rows_s, steps_s = memory
    kv_full, full, empty = barriers
    for c in gl.static_range(CONSUMERS):
        mbarrier.expect(kv_full.index(c), 2 * k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k_desc, [b, kv_head, key + c * N, 0], kv_full.index(c), k_s.index(c))
        tma.async_copy_global_to_shared(v_desc, [b, kv_head, key + c * N, 0], kv_full.index(c), v_s.index(c))
    i = 0
    for h in range(kv_head * R, kv_head * R + R):
        for position in range(begin, end, M):
            s = i % STAGES
            mbarrier.wait(empty.index(s), ((i // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(s), 2 * q_desc.block_type.nbytes + rows_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(q_desc, [b, h, position, 0], full.index(s), q_s.index(s))
            tma.async_copy_global_to_shared(rows_desc, [b, h, 0, position], full.index(s), rows_s.index(s))
            tma.async_copy_global_to_shared(do_desc, [b, h, position, 0], full.index(s), do_s.index(s))
            i += 1


@gluon.jit
def weights(
    scores, lse, steps_s, scale, step, highs, full, M: gl.constexpr, N: gl.constexpr, BOUNDED: gl.constexpr,
):
    """P^T [N, M] of the keys from `first` and the queries from `position`."""
    L: gl.constexpr = scores.type.layout
    p = scores * scale - lse
    crossed = step < N - 1
    if BOUNDED:
        crossed = crossed | (step + M > full)
    if crossed:
        keys = gl.arange(0, N, layout=gl.SliceLayout(1, L))
        steps = steps_s.load(L)
        seen = gl.expand_dims(keys - step, 1) <= steps
        if BOUNDED:
            seen = seen & (steps <= gl.expand_dims(highs - step, 1))
        p = gl.where(seen, p, -float("inf"))
    return gl.exp2(p)


@gluon.jit
def consume(
    outputs, memory, barriers, ends_ptr, window, T, b, kv_head, key, begin, end, full_end, R, scale, grad_scale,
    C: gl.constexpr, M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, BOUNDED: gl.constexpr,
):  # fmt: skip
    """dk and dv of the N keys of consumer C."""
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    O_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_L: gl.constexpr = gl.DotOperandLayout(0, O_L, 2)
    q_s, k_s, v_s, do_s, rows_s, steps_s = memory
    kv_full, full, empty = barriers
    dtype: gl.constexpr = q_s.dtype
    first = key + C * N
    keys = first + gl.arange(0, N, layout=gl.SliceLayout(1, S_L))
    highs = last_query(ends_ptr, window, b, T, keys) - first if BOUNDED else keys
    k = k_s.index(C).reshape((N, D))
    v = v_s.index(C).reshape((N, D))
    zero = gl.zeros((N, M), gl.float32, S_L)
    dk = warpgroup_mma_init(gl.zeros((N, D), gl.float32, O_L))
    dv = warpgroup_mma_init(gl.zeros((N, D), gl.float32, O_L))

    mbarrier.wait(kv_full.index(C), 0)
    first_step = begin - first
    end_step = end - first
    seen_by_all = full_end - first
    step = first_step
    for i in range((end - begin + M - 1) // M * R):
        s = i % STAGES
        q = q_s.index(s).reshape((M, D))
        do = do_s.index(s).reshape((M, D))
        rows = rows_s.index(s).reshape((2, M))
        mbarrier.wait(full.index(s), (i // STAGES) & 1)
        st = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
        dpt = warpgroup_mma(v, do.permute((1, 0)), zero, use_acc=False, is_async=True)
        st = warpgroup_mma_wait(1, deps=(st,))
        p = weights(st, rows.slice(0, 1).load(S_L), steps_s, scale, step, highs, seen_by_all, M, N, BOUNDED)
        step = gl.where(step + M < end_step, step + M, first_step)
        p16 = gl.convert_layout(p.to(dtype), P_L)
        dv = warpgroup_mma(p16, do, dv, is_async=True)
        dpt = warpgroup_mma_wait(1, deps=(dpt,))
        ds16 = gl.convert_layout((p * (dpt - rows.slice(1, 1).load(S_L))).to(dtype), P_L)
        dk = warpgroup_mma(ds16, q, dk, is_async=True)
        dk, dv, p16, ds16 = warpgroup_mma_wait(0, deps=(dk, dv, p16, ds16))
        mbarrier.arrive(empty.index(s))
        dk = warpgroup_mma_init(dk)
        dv = warpgroup_mma_init(dv)
    dk, dv = warpgroup_mma_wait(0, deps=(dk, dv))
    # Its own keys and values have been read: the results take their place.
    dk_desc, dv_desc = outputs
    k.store((dk * grad_scale).to(dtype))
    v.store(dv.to(dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(dk_desc, [b, kv_head, first, 0], k_s.index(C))
    tma.async_copy_shared_to_global(dv_desc, [b, kv_head, first, 0], v_s.index(C))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["T", "H", "R", "section", "window"])
def gluon_dkdv_kernel(
    q_desc, k_desc, v_desc, do_desc, rows_desc, dk_desc, dv_desc, ends_ptr, T, H, R, section, window, scale, grad_scale,
    M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, BOUNDED: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """Write dk, dv [B, K, T, D] of a tile of 2 N keys, summed over R query heads in their order.

    Descriptors: of [B, heads, T, D] in blocks of M (q, do) or N (k, v, dk, dv) rows; of rows fp32 [B, H, 2, length].
    """
    CONSUMERS: gl.constexpr = 2
    # Keys early in the sequence are seen by the most queries: the longest start first.
    tile, head = tile_and_head(gl.cdiv(T, CONSUMERS * N), section)
    K = H // R
    b = head // K
    kv_head = head % K
    key = tile * CONSUMERS * N
    begin, far, end, full_end, block = queries_seeing(
        ends_ptr, window, b, key, 0, T, M, CONSUMERS * N, BOUNDED, 0, 1, 1
    )
    q_s = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, M, D], q_desc.layout)
    do_s = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, M, D], q_desc.layout)
    rows_s = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 1, 2, M], rows_desc.layout)
    k_s = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 1, N, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 1, N, D], k_desc.layout)
    steps_s = gl.allocate_shared_memory(gl.int32, [1, M], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    STEPS_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    steps_s.store(gl.expand_dims(gl.arange(0, M, layout=gl.SliceLayout(0, STEPS_L)), 0))
    kv_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(kv_full.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    memory = (q_s, k_s, v_s, do_s, rows_s, steps_s)
    barriers = (kv_full, full, empty)
    outputs = (dk_desc, dv_desc)
    inputs = (q_desc, k_desc, v_desc, do_desc, rows_desc)
    gl.warp_specialize([
        (consume, (outputs, memory, barriers, ends_ptr, window, T, b, kv_head, key, begin, end, full_end, R, scale,
                   grad_scale, 0, M, N, D, STAGES, BOUNDED)),
        (consume, (outputs, memory, barriers, ends_ptr, window, T, b, kv_head, key, begin, end, full_end, R, scale,
                   grad_scale, 1, M, N, D, STAGES, BOUNDED)),
        (produce, (inputs, memory, barriers, b, kv_head, key, begin, end, R, M, N, STAGES, CONSUMERS)),
    ], [4, 1], [REGISTERS, 24])  # fmt: skip
