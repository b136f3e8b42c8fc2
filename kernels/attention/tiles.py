"""How attention is cut into tiles on each architecture, and the loads that the kernels share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.dispatch import INTERPRETED, padded


@dataclass(frozen=True)
class Tile:
    """block_m query rows by block_n key rows, computed by `warps` warps with `stages` loads in
    flight.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int


def tile_width(D: int) -> int:
    """The side of a tile that holds a head of width D; 16 is the least that a matrix instruction
    takes.
    """
    return padded(D, 16)


# By (kind of kernel, padded head width), chosen from the compiler's report (`python -m kernels.aot`): no
# spills, and shared memory within the architecture's. The tight ones are for kernels with dropout or
# with padded heads, which take more registers. Ampere's fit 99 KiB and serve all GPUs with mma but no
# wgmma (sm_8x, sm_12x).
HOPPER = {
    ("forward", 16): Tile(128, 64, 4, 3),
    ("forward", 32): Tile(128, 64, 4, 3),
    ("forward", 64): Tile(128, 64, 4, 3),
    ("forward", 128): Tile(128, 128, 8, 2),
    ("forward", 256): Tile(128, 64, 8, 2),
    ("dkdv", 16): Tile(64, 128, 8, 2),
    ("dkdv", 32): Tile(64, 128, 8, 2),
    ("dkdv", 64): Tile(64, 128, 8, 2),
    ("dkdv", 128): Tile(64, 64, 8, 2),
    ("dkdv", 256): Tile(32, 32, 8, 1),
    ("dq", 16): Tile(128, 64, 8, 2),
    ("dq", 32): Tile(128, 64, 8, 2),
    ("dq", 64): Tile(128, 64, 8, 2),
    ("dq", 128): Tile(128, 64, 8, 2),
    ("dq", 256): Tile(64, 32, 8, 2),
}
HOPPER_TIGHT = HOPPER | {
    ("forward", 64): Tile(128, 64, 8, 3),
    ("forward", 128): Tile(128, 64, 8, 3),
    ("forward", 256): Tile(64, 32, 8, 2),
    ("dkdv", 64): Tile(64, 64, 8, 2),
    ("dkdv", 128): Tile(32, 64, 8, 2),
    ("dq", 256): Tile(32, 32, 8, 1),
}
BLACKWELL = HOPPER | {
    ("forward", 16): Tile(128, 64, 8, 3),
    ("forward", 256): Tile(64, 64, 8, 2),
    ("dkdv", 128): Tile(32, 64, 8, 2),
}
BLACKWELL_TIGHT = HOPPER_TIGHT | {
    ("forward", 16): Tile(128, 64, 8, 3),
    ("forward", 32): Tile(128, 64, 8, 3),
    ("forward", 64): Tile(64, 64, 4, 3),
    ("dkdv", 32): Tile(64, 64, 8, 2),
    ("dkdv", 128): Tile(32, 64, 8, 1),
}
AMPERE = {
    ("forward", 16): Tile(128, 64, 4, 3),
    ("forward", 32): Tile(128, 64, 4, 3),
    ("forward", 64): Tile(128, 64, 4, 3),
    ("forward", 128): Tile(128, 64, 8, 3),
    ("forward", 256): Tile(64, 32, 8, 2),
    ("dkdv", 16): Tile(64, 64, 8, 2),
    ("dkdv", 32): Tile(64, 64, 8, 2),
    ("dkdv", 64): Tile(32, 64, 4, 2),
    ("dkdv", 128): Tile(64, 64, 8, 1),
    ("dkdv", 256): Tile(16, 64, 8, 1),
    ("dq", 16): Tile(128, 64, 8, 2),
    ("dq", 32): Tile(128, 64, 8, 2),
    ("dq", 64): Tile(128, 64, 8, 2),
    ("dq", 128): Tile(64, 64, 8, 2),
    ("dq", 256): Tile(64, 32, 8, 1),
}
AMPERE_TIGHT = AMPERE | {
    ("forward", 16): Tile(128, 64, 8, 3),
    ("forward", 32): Tile(128, 64, 8, 3),
    ("forward", 64): Tile(128, 64, 8, 3),
    ("forward", 128): Tile(64, 64, 4, 3),
    ("dkdv", 16): Tile(32, 64, 8, 2),
    ("dkdv", 32): Tile(32, 64, 8, 2),
    ("dkdv", 64): Tile(32, 64, 8, 2),
    ("dkdv", 256): Tile(32, 32, 8, 1),
    ("dq", 16): Tile(64, 64, 8, 2),
    ("dq", 32): Tile(64, 64, 8, 2),
    ("dq", 64): Tile(64, 64, 8, 2),
    ("dq", 256): Tile(32, 32, 8, 1),
}
# fp32 products are exact fp32 (no TF32) and run without tensor cores: right, not fast.
ANY_32_BIT = {
    (kind, width): Tile(16, 16, 4, 1) if width == 256 else Tile(32, 32, 4, 1)
    for kind in ("forward", "dkdv", "dq")
    for width in (16, 32, 64, 128, 256)
}
INTERPRETER = Tile(64, 32, 4, 1)


def tile_for(kind: str, D: int, itemsize: int, major: int, dropout: bool) -> Tile:
    """The tile of `kind` ("forward", "dkdv" or "dq") for heads of width D.

    itemsize: bytes per element. major: of the compute capability.
    """
    width = tile_width(D)
    if itemsize == 4:
        return ANY_32_BIT[kind, width]
    tight = dropout or width != D
    plain_table, tight_table = {9: (HOPPER, HOPPER_TIGHT), 10: (BLACKWELL, BLACKWELL_TIGHT)}.get(
        major, (AMPERE, AMPERE_TIGHT)
    )
    return (tight_table if tight else plain_table)[kind, width]


def tile_here(kind: str, x: torch.Tensor, dropout: bool) -> Tile:
    """The tile of `kind` for heads of x [..., D] on the device of x."""
    if INTERPRETED:
        return INTERPRETER
    major, _ = torch.cuda.get_device_capability(x.device)
    return tile_for(kind, x.shape[-1], x.element_size(), major, dropout)


@triton.jit
def load_rows(
    ptr, stride, first, limit, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, CHECK:
    tl.constexpr
):  # fmt: skip
    """Rows first to first + ROWS - 1 of a [limit, D] matrix, padded with zeros to [ROWS, WIDTH]."""
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, WIDTH)
    # The 64-bit product is one scalar; the offsets inside the tile fit 32 bits.
    ptrs = ptr + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + cols[None, :]
    if CHECK:
        return tl.load(ptrs, (rows[:, None] < limit - first) & (cols[None, :] < D), 0.0)
    if WIDTH != D:
        return tl.load(ptrs, cols[None, :] < D, 0.0)
    return tl.load(ptrs)


@triton.jit
def store_rows(
    ptr, stride, first, limit, tile, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Store what of `tile` [ROWS, WIDTH] lies inside the [limit, D] matrix, from its row `first`
    on.
    """
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, WIDTH)
    ptrs = ptr + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + cols[None, :]
    inside = (rows[:, None] < limit - first) & (cols[None, :] < D)
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), inside)
