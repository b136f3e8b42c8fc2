"""The forward pass of attention on Hopper, with the schedule of FlashAttention-3 (Shah et al. 2024).

A program owns the queries of CONSUMERS tiles of M, one for each consumer. The producer copies tiles of N keys and
values, from the diagonal down to the first key that is seen. Each consumer has the products of two tiles in flight:
Q K^T of the next tile and P V of this one. The softmax of the next tile runs beside P V. Consumers take turns to issue
their products: so one finds its exponentials while the tensor cores work for the other.
The numbers are those of the Triton form (kernels/attention/forward.py): online softmax and lse in base 2.
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

from kernels.attention.gluon.parts import await_tile, fetch, release, ring, tile_of
from kernels.attention.parts import UNSEEN
from kernels.attention.walk import first_key, tile_and_head

CONSUMERS = gl.constexpr(2)


@gluon.jit
def produce(
    q_desc, k_desc, v_desc, memory, place, R,
    M: gl.constexpr, N: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
):  # fmt: skip
    """Copy the queries from `row` on, and n tiles of keys and values: first the `last` tile, then those before it."""
    q_s, q_full, keys, values, _ = memory
    b, h, row, last, n = place
    kv_head = h // R
    for c in gl.static_range(CONSUMERS):
        mbarrier.expect(q_full.index(c), q_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(q_desc, [b, h, row + c * M, 0], q_full.index(c), q_s.index(c))
    fetch(k_desc, b, kv_head, last * N, keys, 0, K_STAGES)
    for i in range(1, n):
        # Consumers wait for K(i), then release V(i - 2): with one stage the other order here would wait for ever.
        fetch(k_desc, b, kv_head, (last - i) * N, keys, i, K_STAGES)
        fetch(v_desc, b, kv_head, (last - i + 1) * N, values, i - 1, V_STAGES)
    fetch(v_desc, b, kv_head, (last - n + 1) * N, values, n - 1, V_STAGES)


@gluon.jit
def seen_by(
    starts_ptr, window, b, T, first, last,
    M: gl.constexpr, N: gl.constexpr, ROWS: gl.constexpr, BOUNDED: gl.constexpr,
):  # fmt: skip
    """What the M queries from `first` on see of the tiles, for `masked`: (last, near, far, positions, first keys).

    Tiles before the near-th hold keys after the first query, tiles after the far-th keys that not all queries see.
    """
    positions = first + gl.arange(0, M, layout=ROWS)
    lows = positions
    near = last + 1 - first // N
    far = last
    if BOUNDED:
        lows = first_key(starts_ptr, window, b, T, positions)
        far -= gl.cdiv(first_key(starts_ptr, window, b, T, gl.minimum(first + M, T) - 1), N)
    return last, near, far, positions, lows


@gluon.jit
def masked(scores, i, seen, N: gl.constexpr, BOUNDED: gl.constexpr):
    """Scores [M, N] of the i-th tile: those of keys that a query does not see become UNSEEN. seen: see seen_by."""
    last, near, far, positions, lows = seen
    partial = i < near
    if BOUNDED:
        partial |= i > far
    if partial:
        cols = (last - i) * N + gl.arange(0, N, layout=gl.SliceLayout(0, scores.type.layout))
        visible = cols[None, :] <= positions[:, None]
        if BOUNDED:
            visible &= cols[None, :] >= lows[:, None]
        scores = gl.where(visible, scores, UNSEEN)
    return scores


@gluon.jit
def softmax(scores, high, scale, M: gl.constexpr, N: gl.constexpr):
    """Of raw scores [M, N], to which `scale` gives base 2: (2^(score - new maximum), new maximum, sums [M, 4])."""
    high = gl.maximum(high, gl.max(scores, 1) * scale)
    p = gl.exp2(scores * scale - high[:, None])
    # Of eight columns a thread has a pair. So it finds these sums alone; the exchange between threads comes at the end.
    return p, high, gl.sum(gl.sum(p.reshape((M, N // 8, 4, 2)), 3), 1)


@gluon.jit
def write(acc, high, total, place, o_desc, lse_ptr, b, h, first, T, H, M: gl.constexpr, D: gl.constexpr):
    """Write o and lse of the queries from `first` on; o by way of `place`, whose queries have been read."""
    ROWS: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    total = gl.convert_layout(gl.sum(total, 1), high.type.layout)
    o = acc * gl.convert_layout(1 / total, ROWS)[:, None]
    place.reshape((M, D)).store(o.to(place.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(o_desc, [b, h, first, 0], place)  # which leaves out rows from T on
    positions = first + gl.arange(0, M, layout=high.type.layout)
    lse = lse_ptr + (gl.cast(b, gl.int64) * H + h) * T + positions
    gl.store(lse, high + gl.log2(total), mask=positions < T)
    tma.store_wait(0)


@gluon.jit
def consume(
    memory, place, o_desc, lse_ptr, starts_ptr, T, H, window, scale,
    C: gl.constexpr, M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, K_STAGES: gl.constexpr,
    V_STAGES: gl.constexpr, BOUNDED: gl.constexpr,
):  # fmt: skip
    """Write o and lse of the M queries of consumer C."""
    q_s, q_full, keys, values, turn = memory
    b, h, row, last, n = place
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    first = row + C * M
    seen = seen_by(starts_ptr, window, b, T, first, last, M, N, S_ROWS, BOUNDED)
    q = q_s.index(C).reshape((M, D))
    zero = gl.zeros((M, N), gl.float32, S_LAYOUT)
    high = gl.full((M,), float("-inf"), gl.float32, S_ROWS)
    acc = warpgroup_mma_init(gl.zeros((M, D), gl.float32, O_LAYOUT))

    mbarrier.wait(q_full.index(C), 0)
    await_tile(keys, 0, K_STAGES)
    mbarrier.wait(turn.index(C), 1 - C)
    k = tile_of(keys, 0, N, D, K_STAGES).permute((1, 0))
    scores = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    mbarrier.arrive(turn.index(1 - C))
    release(keys, 0, K_STAGES)
    scores = masked(scores, 0, seen, N, BOUNDED)
    weights, high, total = softmax(scores, high, scale, M, N)
    T_ROWS: gl.constexpr = gl.SliceLayout(1, total.type.layout)
    p = gl.convert_layout(weights.to(q_s.dtype), P_LAYOUT)
    await_tile(keys, 1, K_STAGES, n > 1)
    for i in range(1, n):
        await_tile(values, i - 1, V_STAGES)
        mbarrier.wait(turn.index(C), i % 2 ^ (1 - C))
        k = tile_of(keys, i, N, D, K_STAGES).permute((1, 0))
        scores = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
        acc = warpgroup_mma(p, tile_of(values, i - 1, N, D, V_STAGES), acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=(scores,))
        mbarrier.arrive(turn.index(1 - C))  # the other's products follow P V
        release(keys, i, K_STAGES)
        scores = masked(scores, i, seen, N, BOUNDED)
        weights, higher, sums = softmax(scores, high, scale, M, N)
        shrink = gl.exp2(high - higher)
        total = total * gl.convert_layout(shrink, T_ROWS)[:, None] + sums
        high = higher
        # A branch between the softmax and the wait: inside one basic block ptxas moves the wait above the softmax.
        await_tile(keys, i + 1, K_STAGES, i + 1 < n)
        acc, p, weights = warpgroup_mma_wait(0, deps=(acc, p, weights))
        release(values, i - 1, V_STAGES)
        acc = warpgroup_mma_init(acc * gl.convert_layout(shrink, O_ROWS)[:, None])
        p = gl.convert_layout(weights.to(q_s.dtype), P_LAYOUT)
    await_tile(values, n - 1, V_STAGES)
    acc = warpgroup_mma(p, tile_of(values, n - 1, N, D, V_STAGES), acc, is_async=True)
    acc, p = warpgroup_mma_wait(0, deps=(acc, p))
    write(acc, high, total, q_s.index(C), o_desc, lse_ptr, b, h, first, T, H, M, D)


@gluon.jit(do_not_specialize=["T", "section", "window"])
def gluon_forward_kernel(
    q_desc, k_desc, v_desc, o_desc, lse_ptr, starts_ptr, T, H, R, section, window, scale,
    M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
    BOUNDED: gl.constexpr,
):  # fmt: skip
    """Write o and lse fp32 [B, H, T] of CONSUMERS M queries of one head. Descriptors are of [B, heads, T, D].

    starts: int32 [B, T], the first token of each token's document, or None. R: query heads of a key/value head.
    BOUNDED: whether there are documents or a window; else `window` is T.
    """
    tiles = gl.cdiv(T, CONSUMERS * M)
    tile, head = tile_and_head(tiles, section)
    b = head // H
    h = head % H
    row = (tiles - 1 - tile) * CONSUMERS * M  # the last tile has the most keys: the longest start first
    last = (gl.minimum(row + CONSUMERS * M, T) - 1) // N
    n = last + 1
    if BOUNDED:
        n -= first_key(starts_ptr, window, b, T, row) // N
    q_s = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 1, M, D], q_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    for c in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(c), count=1)
        mbarrier.init(turn.index(c), count=1)
    keys = ring(k_desc, N, D, K_STAGES, CONSUMERS)
    values = ring(v_desc, N, D, V_STAGES, CONSUMERS)
    memory = (q_s, q_full, keys, values, turn)
    place = (b, h, row, last, n)
    gl.warp_specialize([
        (consume, (memory, place, o_desc, lse_ptr, starts_ptr, T, H, window, scale,
                   0, M, N, D, K_STAGES, V_STAGES, BOUNDED)),
        (consume, (memory, place, o_desc, lse_ptr, starts_ptr, T, H, window, scale,
                   1, M, N, D, K_STAGES, V_STAGES, BOUNDED)),
        (produce, (q_desc, k_desc, v_desc, memory, place, R, M, N, K_STAGES, V_STAGES)),
    ], [4, 1], [240, 24])  # fmt: skip
