"""Chooses the tiles of the norms, and views tensors as rows. M rows, C width."""

from typing import NamedTuple

from torch import Tensor

from kernels.dispatch import cdiv, padded

LEAST_COLS = 128
MAX_WIDTH = 16384  # the forward holds a row in registers
# The backward holds a row of at most this width in registers, and reads a wider one twice: for the two means of the row
# (MEAN_COLS at a time), then in blocks of BLOCK_COLS.
BACKWARD_WIDTH, DROPOUT_BACKWARD_WIDTH = 8192, 6144
MEAN_COLS, BLOCK_COLS = 8192, 4096


class Tile(NamedTuple):
    """`rows` rows, each held as `chunks` chunks of `cols` columns, by `warps` warps."""

    rows: int
    cols: int
    chunks: int
    warps: int


def chunks_of(C: int) -> tuple[int, int]:
    """(cols, chunks): C rounded up to a power of two in one chunk, or to three quarters of it in three.

    Triton's tiles have powers of two as sides: so 768 is 3 x 256 without padding, and 5120 3 x 2048. Smaller chunks
    would pad less, but leave a thread too few neighbouring elements for wide loads.
    """
    cols = padded(C, 16)
    quarter = cols // 4
    return (quarter, 3) if quarter >= LEAST_COLS and 3 * quarter >= C else (cols, 1)


def forward_tile(C: int, dropout: bool) -> Tile:
    """16 to 48 elements a thread, half of that where random words come on top."""
    cols, chunks = chunks_of(C)
    warps = min(16, max(4, padded(cols * chunks // 1024 + 1) // 2))
    return Tile(rows_to_tile(C), cols, chunks, min(16, warps * 2) if dropout else warps)


def backward_tile(C: int, dropout: bool) -> Tile:
    """For rows of at most BACKWARD_WIDTH, or a block of a wider one: 8 to 24 elements a thread, each held five times
    (normalised x, its gradient, the weight and two sums); half of the rows where random words come on top.
    """
    cols, chunks = chunks_of(C)
    rows, warps = rows_to_tile(C), 16 if cols > 4096 else 8
    rows = max(1, rows // 2) if dropout else rows
    while warps == 8 and rows * cols > 2048:
        cols, chunks = cols // 2, chunks * 2
    if not dropout and rows * cols == 1024:
        warps = 4  # a thread then holds 8 neighbours, which in 16 bits it stores as 16 bytes
    return Tile(rows, cols, chunks, warps)


def column_blocks(C: int, dropout: bool) -> tuple[Tile, int]:
    """(tile of the backward, blocks of columns that rows are cut into)."""
    widest = DROPOUT_BACKWARD_WIDTH if dropout else BACKWARD_WIDTH
    if widest >= C:
        return backward_tile(C, dropout), 1
    return backward_tile(BLOCK_COLS, dropout), cdiv(C, BLOCK_COLS)


def rows_to_tile(C: int) -> int:
    return max(1, min(16, 4096 // padded(C)))


def rows_of(x: Tensor | None) -> Tensor | None:
    """Return x [..., C] as [B, T, C], copied only where its strides force it; None of None."""
    return x if x is None or x.ndim == 3 else x.reshape(1, -1, x.shape[-1])
