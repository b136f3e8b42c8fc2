"""How rows are cut into tiles, and tensors into rows. M rows, C width."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kernels.dispatch import padded

MAX_CHUNKS = 8
LEAST_COLS = 128
# Wider rows are not held in registers but read twice.
FORWARD_WIDTH, BACKWARD_WIDTH = 16384, 8192
WIDE_FORWARD_COLS, WIDE_BACKWARD_COLS = 8192, 4096


class Tile(NamedTuple):
    """`rows` rows, each held as `chunks` chunks of `cols` columns, by `warps` warps."""

    rows: int
    cols: int
    chunks: int
    warps: int


def chunks_of(C: int) -> tuple[int, int]:
    """(cols, chunks) with cols * chunks >= C as close to C as powers of two allow: Triton's tiles have such sides.

    So 768 is 3 x 256 and 5120 is 5 x 1024, where one tile would be idle on 25 and 38 % of its columns.
    """
    whole = padded(C, 16)
    cuts = [(whole // n, -(-C // (whole // n))) for n in (1, 2, 4, 8) if n == 1 or whole // n >= LEAST_COLS]
    return min(cuts, key=lambda cut: (cut[0] * cut[1], cut[1]))


def forward_tile(C: int) -> Tile:
    """For rows of at most FORWARD_WIDTH: 16 to 48 elements a thread."""
    cols, chunks = chunks_of(C)
    return Tile(rows_to_tile(C), cols, chunks, min(16, max(4, padded(cols * chunks // 1024 + 1) // 2)))


def backward_tile(C: int) -> Tile:
    """For rows of at most BACKWARD_WIDTH, or a block of a wider one: 8 to 28 elements a thread, each held five times
    (normalised x, its gradient, the weight and two sums). Of 8 warps, 8 at once: a mask's random words are held too.
    """
    cols, chunks = chunks_of(C)
    rows, warps = rows_to_tile(C), 16 if cols > 4096 else 8
    while warps == 8 and rows * cols > 2048:
        cols, chunks = cols // 2, chunks * 2
    return Tile(rows, cols, chunks, warps)


def rows_to_tile(C: int) -> int:
    return max(1, min(16, 4096 // padded(C)))


def rows_of(x: Tensor) -> Tensor:
    """x [..., C] as [B, T, C] with the last dimension contiguous; copies only where the strides of other than three
    dimensions, or of the last, force it.
    """
    rows = x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()
