"""The ring of stages, through which a producer hands tiles to consumers.

A *producer* is the warp that copies tiles to shared memory, a *consumer* a warpgroup that multiplies them. A *ring* is
(stages, full, empty): the barrier `full` of a stage says that it holds a tile, `empty` that every consumer has read it.
A barrier's phases alternate between the parities 0 and 1. A wait for a parity returns once a phase of it is over, and
at once for parity 1 of a new barrier.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma


@gluon.jit
def ring(desc, ROWS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr):
    """A ring of STAGES empty stages for tiles [ROWS, D] of a descriptor."""
    stages = gl.allocate_shared_memory(desc.dtype, [STAGES, 1, 1, ROWS, D], desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=CONSUMERS)
    return stages, full, empty


@gluon.jit
def fetch(desc, b, h, row, tiles, i, STAGES: gl.constexpr):
    """Producer: once the stage of the i-th tile is empty, begin to copy it, from `row` on of head h of sample b."""
    stages, full, empty = tiles
    s = i % STAGES
    mbarrier.wait(empty.index(s), i // STAGES % 2 ^ 1)
    mbarrier.expect(full.index(s), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [b, h, row, 0], full.index(s), stages.index(s))


@gluon.jit
def await_tile(tiles, i, STAGES: gl.constexpr, pred=True):
    """Consumer: wait until the i-th tile is there."""
    mbarrier.wait(tiles[1].index(i % STAGES), i // STAGES % 2, pred=pred)


@gluon.jit
def tile_of(tiles, i, ROWS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    """The i-th tile, [ROWS, D]."""
    return tiles[0].index(i % STAGES).reshape((ROWS, D))


@gluon.jit
def release(tiles, i, STAGES: gl.constexpr):
    """Consumer: say that this warpgroup has read the i-th tile."""
    mbarrier.arrive(tiles[2].index(i % STAGES))
