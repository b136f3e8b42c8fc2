"""Small Gluon kernels for the emulator's own tests: right ones, which the tests break."""

# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false

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


@gluon.jit
def produce(x_desc, x_s, full, empty, n, ROWS: gl.constexpr, STAGES: gl.constexpr):
    for i in range(n):
        s = i % STAGES
        mbarrier.wait(empty.index(s), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(s), x_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(x_desc, [i * ROWS, 0], full.index(s), x_s.index(s))


@gluon.jit
def consume(y_desc, x_s, y_s, full, empty, n, ROWS: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr):
    """y = the sum over tiles x of exp2(x x^T) x, whose two products are in flight beside each other."""
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    Y_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    P_L: gl.constexpr = gl.DotOperandLayout(0, Y_L, 2)
    zero = gl.zeros((ROWS, ROWS), gl.float32, S_L)
    y = warpgroup_mma_init(gl.zeros((ROWS, WIDTH), gl.float32, Y_L))
    for i in range(n):
        s = i % STAGES
        mbarrier.wait(full.index(s), (i // STAGES) & 1)
        x = x_s.index(s)
        scores = warpgroup_mma(x, x.permute((1, 0)), zero, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        p = gl.convert_layout(gl.exp2(scores * 0.125).to(gl.bfloat16), P_L)
        y = warpgroup_mma(p, x, y, is_async=True)
        y, p = warpgroup_mma_wait(0, deps=(y, p))
        y = warpgroup_mma_init(y)
        mbarrier.arrive(empty.index(s))
    y = warpgroup_mma_wait(0, deps=(y,))
    y_s.store(y.to(gl.bfloat16))
    fence_async_shared()
    tma.async_copy_shared_to_global(y_desc, [0, 0], y_s)
    tma.store_wait(0)


@gluon.jit
def ring(x_desc, y_desc, T, ROWS: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr):
    """A producer and a consumer over a ring of tiles."""
    n = gl.cdiv(T, ROWS)
    x_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, ROWS, WIDTH], x_desc.layout)
    y_s = gl.allocate_shared_memory(gl.bfloat16, [ROWS, WIDTH], y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    gl.warp_specialize(
        [
            (consume, (y_desc, x_s, y_s, full, empty, n, ROWS, WIDTH, STAGES)),
            (produce, (x_desc, x_s, full, empty, n, ROWS, STAGES)),
        ],
        [1],
        [24],
    )


@gluon.jit
def divide(x_ptr, q_ptr, r_ptr, T, by, SIZE: gl.constexpr):
    """q = x / by and r = x mod by, of int32 [T], a tile per program."""
    at = gl.program_id(0) * SIZE + gl.arange(0, SIZE, gl.BlockedLayout([1], [32], [4], [0]))
    x = gl.load(x_ptr + at, mask=at < T, other=0)
    gl.store(q_ptr + at, x // by, mask=at < T)
    gl.store(r_ptr + at, x % by, mask=at < T)


@gluon.jit
def shift(x_ptr, T, SIZE: gl.constexpr):
    """Each program but the last moves its tile of x [T] by one element, within the tile."""
    at = gl.program_id(0) * SIZE + gl.arange(0, SIZE, gl.BlockedLayout([1], [32], [4], [0]))
    x = gl.load(x_ptr + at, mask=at < T, other=0)
    gl.store(x_ptr + at + 1, x, mask=(at % SIZE < SIZE - 1) & (at < T - 1))


@gluon.jit
def write(x_s, ready, value):
    x_s.store(gl.full((16, 16), value, gl.float32, gl.BlockedLayout([1, 1], [4, 8], [4, 1], [1, 0])))
    mbarrier.arrive(ready.index(0))


@gluon.jit
def read(x_ptr, x_s, ready):
    L: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [4, 1], [1, 0])
    mbarrier.wait(ready.index(0), 0)
    x = x_s.load(L)
    at = gl.arange(0, 16, gl.SliceLayout(1, L))[:, None] * 16 + gl.arange(0, 16, gl.SliceLayout(0, L))[None, :]
    gl.store(x_ptr + at, x)
    mbarrier.arrive(ready.index(1))


@gluon.jit
def handover(x_ptr, value):
    """One partition writes 16 x 16 numbers to shared memory, another stores them."""
    x_s = gl.allocate_shared_memory(gl.float32, [16, 16], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(ready.index(0), count=1)
    mbarrier.init(ready.index(1), count=1)
    gl.warp_specialize([(read, (x_ptr, x_s, ready)), (write, (x_s, ready, value))], [4], [24])
    mbarrier.wait(ready.index(1), 0)
    mbarrier.invalidate(ready.index(0))
    mbarrier.invalidate(ready.index(1))
