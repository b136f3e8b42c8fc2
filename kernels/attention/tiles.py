"""Chooses the tiles of attention on each architecture."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from kernels.dispatch import INTERPRETED, padded


@dataclass(frozen=True)
class Tile:
    """block_m query rows by block_n key rows, computed by `warps` warps with `stages` loads in flight, which are bulk
    copies (TMA) if `tma` and the tensors lie so that a descriptor can stand for them.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    tma: bool = False


def tile_width(D: int) -> int:
    """Return the padded width of heads of width D: at least 16, as the matrix instructions need."""
    return padded(D, 16)


KINDS = ("forward", "dkdv", "dq", "fused")
WIDTHS = (16, 32, 64, 128, 256)  # padded
Table = dict[tuple[str, int], Tile]


def table(tma: bool, **lines: str) -> Table:
    """A table from one line per kind: for each of WIDTHS, block_m x block_n x warps x stages."""
    tiles = {}
    for kind, line in lines.items():
        for width, cell in zip(WIDTHS, line.split(), strict=True):
            block_m, block_n, warps, stages = map(int, cell.split("x"))
            tiles[kind, width] = Tile(block_m, block_n, warps, stages, tma)
    return tiles


@dataclass(frozen=True)
class Tables:
    """The tiles of one architecture, chosen from the compiler's report (`python -m benchmarks.kernels.aot`): no spills,
    and shared memory within the architecture's.

    plain: causal attention, also with a window or documents. crowded: with dropout or softcap, which take registers.
    pointers: any of these, for tensors that no TMA descriptor stands for (padded heads among them), whose addresses
    take registers. small: any of these, for short sequences, which want many tiles, and block-sparse patterns, which
    want them inside their blocks: at most 64 by 64. l2: bytes of the least GPU's cache, for the order of the programs.
    """

    plain: Table
    crowded: Table
    pointers: Table
    small: Table
    l2: int


HOPPER = Tables(
    plain=table(
        True,
        forward="128x64x4x3 128x64x4x3 128x64x4x3 128x128x8x2 128x64x8x2",
        dkdv="64x128x8x2 64x128x8x2 64x128x8x2 32x128x8x2 32x32x8x1",
        dq="128x64x8x2 128x64x8x2 128x64x8x2 128x64x8x2 64x64x8x2",
        fused="64x128x8x2 64x128x8x2 64x128x8x2 32x128x8x1 32x32x8x1",
    ),
    crowded=table(
        True,
        forward="128x64x4x3 128x64x8x3 128x64x8x3 128x64x8x3 64x64x8x2",
        dkdv="64x128x8x2 64x128x8x2 32x64x8x2 16x64x8x2 16x16x8x1",
        dq="128x64x8x2 128x64x8x2 128x64x8x2 128x64x8x2 64x32x8x2",
        fused="32x64x8x2 32x64x8x2 32x64x8x1 32x32x8x2 16x16x8x1",
    ),
    pointers=table(
        False,
        forward="128x64x4x3 128x64x8x3 128x64x8x3 128x64x8x3 64x32x8x2",
        dkdv="32x64x8x2 32x64x8x2 32x64x8x2 32x64x8x1 32x32x8x1",
        dq="128x64x8x2 128x64x8x2 128x64x8x2 128x32x8x2 32x32x8x2",
        fused="32x64x8x2 32x64x8x2 32x64x8x2 32x32x8x1 16x16x8x2",
    ),
    small=table(
        True,
        forward="64x64x4x2 64x64x4x2 64x64x4x2 64x64x8x2 64x32x8x2",
        dkdv="32x64x8x2 32x64x8x2 32x64x8x2 32x32x8x1 16x16x8x1",
        dq="64x64x4x2 64x64x4x2 64x64x8x2 64x32x8x2 16x32x8x1",
        fused="32x64x8x2 32x64x8x2 32x64x8x1 32x32x8x2 16x16x8x1",
    ),
    l2=50 << 20,
)

BLACKWELL = Tables(
    plain=table(
        True,
        forward="64x64x4x3 64x64x4x3 128x64x4x3 128x128x8x2 128x64x8x2",
        dkdv="64x64x8x2 64x64x8x2 64x64x8x2 32x64x8x2 32x32x8x1",
        dq="128x64x8x2 128x64x8x2 128x64x8x2 128x64x8x2 64x64x8x2",
        fused="64x64x8x2 64x64x8x2 32x64x8x2 32x64x8x2 32x32x8x1",
    ),
    crowded=table(
        True,
        forward="128x64x4x3 128x64x4x3 128x64x4x3 64x64x8x2 64x64x8x2",
        dkdv="32x64x8x2 32x64x8x2 32x64x8x1 16x32x8x1 16x16x8x1",
        dq="128x64x8x2 128x64x8x2 128x64x8x2 64x32x8x2 16x32x8x1",
        fused="32x64x8x2 32x64x8x2 32x64x8x2 32x32x8x1 16x16x8x1",
    ),
    pointers=table(
        False,
        forward="128x64x8x3 128x64x8x3 64x64x4x3 128x64x8x3 64x32x8x2",
        dkdv="32x64x8x1 32x64x8x2 32x64x8x2 32x32x8x1 32x32x8x1",
        dq="128x64x8x2 128x64x8x2 128x64x8x2 128x64x8x2 16x32x8x1",
        fused="32x64x8x2 32x64x8x2 32x64x8x2 32x32x8x1 16x16x8x2",
    ),
    small=table(
        True,
        forward="64x64x4x2 64x64x4x2 64x64x4x2 64x64x4x2 32x32x8x1",
        dkdv="32x64x8x1 32x64x8x1 32x32x4x1 32x32x8x1 16x16x8x1",
        dq="64x64x4x2 64x64x4x2 64x64x4x2 64x64x4x2 16x32x8x1",
        fused="32x64x8x1 32x64x8x2 32x32x8x1 32x64x8x1 16x16x8x1",
    ),
    l2=100 << 20,
)

AMPERE = Tables(
    plain=table(
        False,
        forward="128x64x8x3 128x64x8x3 128x64x8x3 128x32x8x3 64x32x8x2",
        dkdv="32x64x8x2 32x64x8x2 32x64x8x1 64x64x8x1 16x64x8x1",
        dq="128x64x8x2 128x64x8x2 128x64x8x2 64x64x8x2 64x32x8x1",
        fused="32x64x8x2 32x64x8x2 32x64x4x2 64x64x8x1 16x32x8x1",
    ),
    crowded=table(
        False,
        forward="128x64x8x3 128x64x8x3 128x32x8x3 64x64x8x2 64x32x8x2",
        dkdv="32x64x8x2 32x64x8x2 32x64x8x1 32x32x8x1 16x16x8x1",
        dq="64x64x8x2 64x64x8x2 64x32x8x2 64x64x8x2 32x32x8x1",
        fused="32x64x8x1 32x64x8x1 32x64x8x2 32x32x8x1 16x16x8x1",
    ),
    pointers={},  # crowded serves: no TMA
    small=table(
        False,
        forward="64x64x4x2 64x64x4x2 64x64x8x2 64x64x8x2 64x32x8x2",
        dkdv="32x64x8x2 32x64x8x2 32x64x8x1 16x32x8x1 16x16x8x1",
        dq="64x64x8x2 64x64x8x2 64x32x8x2 64x32x8x2 16x32x8x1",
        fused="32x64x8x1 32x64x8x1 32x64x8x2 16x32x8x1 16x16x8x1",
    ),
    l2=40 << 20,
)


# fp32 products are exact fp32 (no TF32) and run without tensor cores: right, not fast.
ANY_32_BIT = {
    (kind, width): Tile(16, 16, 4, 1) if width == 256 else Tile(32, 32, 4, 1) for kind in KINDS for width in WIDTHS
}
INTERPRETER = Tile(64, 32, 4, 1)
INTERPRETER_L2 = 1 << 14  # so that tests see several sections of heads
SHORT = 512  # queries: up to here tiles are small


def tables_for(major: int) -> Tables:
    """Ampere's serve all GPUs with mma but neither wgmma nor tcgen05 (sm_8x, sm_12x): they fit 99 KiB."""
    return {9: HOPPER, 10: BLACKWELL}.get(major, AMPERE)


def tile_for(
    kind: str, D: int, itemsize: int, major: int, *, crowded: bool = False, small: bool = False, described: bool = True
) -> Tile:
    """Return the tile of `kind` (one of KINDS) for heads of width D. crowded, small: see Tables.

    itemsize: bytes per element. major: of the compute capability. described: whether inputs fit TMA descriptors.
    """
    key = kind, tile_width(D)
    if itemsize == 4:
        return ANY_32_BIT[key]
    tables = tables_for(major)
    if not described and tables.plain[key].tma:
        return replace((tables.small if small else tables.pointers)[key], tma=False)
    if small:
        return tables.small[key]
    return (tables.crowded if crowded or tile_width(D) != D else tables.plain)[key]


@functools.cache
def capability(device: torch.device) -> int:
    """The major compute capability."""
    return torch.cuda.get_device_capability(device)[0]


def l2_bytes(device: torch.device) -> int:
    return INTERPRETER_L2 if INTERPRETED else tables_for(capability(device)).l2
