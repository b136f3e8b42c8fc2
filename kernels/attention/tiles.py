"""Chooses the tiles of attention on each architecture."""

from dataclasses import dataclass, replace

import torch

from kernels.dispatch import padded


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


@dataclass(frozen=True)
class Tables:
    """The tiles of one architecture, chosen from the compiler's report (`python -m benchmarks.kernels.aot`): no spills,
    and shared memory within the architecture's.

    tiles: by name of the table, kind and width. plain: causal attention, also with a window or documents. crowded: with
    dropout or softcap, which take registers. pointers: any of these, for tensors that no TMA descriptor stands for
    (padded heads among them), whose addresses take registers. small: any of these, for short sequences, which want many
    tiles, and block-sparse patterns, which want them inside their blocks: at most 64 by 64.
    tma: whether the GPUs have it. l2: bytes of the least GPU's cache, for the order of the programs.
    """

    tiles: dict[tuple[str, str, int], Tile]
    tma: bool
    l2: int


def tables_of(l2: int, tma: bool, text: str) -> Tables:
    """Tables from a line per table and kind: for each of WIDTHS, block_m x block_n x warps x stages."""
    tiles = {}
    for line in text.strip().splitlines():
        name, kind, *cells = line.split()
        for width, cell in zip(WIDTHS, cells, strict=True):
            tiles[name, kind, width] = Tile(*map(int, cell.split("x")), tma=tma)
    return Tables(tiles, tma, l2)


HOPPER = tables_of(50 << 20, True, """
    plain    forward 128x64x4x3  128x64x4x3  128x64x4x3  128x128x8x2 128x64x8x2
    plain    dkdv    64x128x8x2  64x128x8x2  64x128x8x2  32x128x8x2  32x32x8x1
    plain    dq      128x64x8x2  128x64x8x2  128x64x8x2  128x64x8x2  64x64x8x2
    plain    fused   64x128x8x2  64x128x8x2  64x128x8x2  32x128x8x1  32x32x8x1
    crowded  forward 128x64x4x3  128x64x8x3  128x64x8x3  128x64x8x3  64x64x8x2
    crowded  dkdv    64x128x8x2  64x128x8x2  32x64x8x2   16x64x8x2   16x16x8x1
    crowded  dq      128x64x8x2  128x64x8x2  128x64x8x2  128x64x8x2  64x32x8x2
    crowded  fused   32x64x8x2   32x64x8x2   32x64x8x1   32x32x8x2   16x16x8x1
    pointers forward 128x64x4x3  128x64x8x3  64x64x4x3   128x64x8x3  64x32x8x2
    pointers dkdv    32x64x8x2   32x64x8x2   32x64x8x2   32x64x8x1   32x32x8x1
    pointers dq      128x64x8x2  128x64x8x2  64x32x8x2   128x32x8x2  32x32x8x2
    pointers fused   32x64x8x2   32x64x8x2   32x64x8x2   32x32x8x1   16x16x8x2
    small    forward 64x64x4x2   64x64x4x2   64x64x4x2   64x64x8x2   64x32x8x2
    small    dkdv    32x64x8x2   32x64x8x2   32x64x8x1   16x64x8x2   16x16x4x1
    small    dq      64x64x4x2   64x64x4x2   64x64x8x2   64x32x8x2   16x32x8x1
    small    fused   32x64x8x2   32x64x8x2   32x64x8x1   16x32x8x1   16x16x8x1
""")  # fmt: skip

BLACKWELL = tables_of(100 << 20, True, """
    plain    forward 64x64x4x3   64x64x4x3   128x64x4x3  128x128x8x2 128x64x8x2
    plain    dkdv    64x64x8x2   64x64x8x2   64x64x8x2   32x64x8x2   32x32x8x1
    plain    dq      128x64x8x2  128x64x8x2  128x64x8x2  128x64x8x2  64x64x8x2
    plain    fused   64x64x8x2   64x64x8x2   32x64x8x2   32x64x8x2   32x32x8x1
    crowded  forward 128x64x4x3  128x64x4x3  128x64x4x3  64x64x8x2   64x64x8x2
    crowded  dkdv    32x64x8x1   32x64x8x1   32x64x8x1   16x32x8x1   16x16x8x1
    crowded  dq      128x64x8x2  128x64x8x2  128x64x8x2  64x32x8x2   16x32x8x1
    crowded  fused   32x64x8x1   32x64x8x2   32x64x8x2   32x32x8x1   16x16x8x1
    pointers forward 128x64x8x3  128x64x8x3  64x64x4x1   128x64x8x3  64x32x8x2
    pointers dkdv    32x64x8x1   32x64x8x2   32x64x8x2   32x32x8x1   32x32x8x1
    pointers dq      128x64x8x2  128x64x8x2  128x64x8x1  128x64x8x2  32x32x8x1
    pointers fused   32x64x8x1   32x64x8x2   32x64x4x2   32x32x8x1   16x16x8x2
    small    forward 64x64x4x2   64x64x4x2   64x64x4x2   64x64x4x2   32x32x8x1
    small    dkdv    32x64x8x2   32x64x8x1   32x32x4x1   32x32x8x1   16x16x8x1
    small    dq      64x64x4x2   64x64x4x2   64x64x8x1   64x64x4x2   16x32x8x1
    small    fused   32x64x8x1   32x64x8x2   32x32x4x1   32x32x8x1   16x16x8x1
""")  # fmt: skip

# No pointers: without TMA crowded serves.
AMPERE = tables_of(40 << 20, False, """
    plain    forward 128x64x8x3  128x64x8x3  128x64x8x3  128x32x8x3  64x32x8x2
    plain    dkdv    32x64x8x2   32x64x8x2   32x64x8x1   64x64x8x1   16x64x8x1
    plain    dq      128x64x8x2  128x64x8x2  128x64x8x2  64x64x8x2   64x32x8x1
    plain    fused   32x64x8x2   32x64x8x2   32x64x4x2   64x64x8x1   16x32x8x1
    crowded  forward 128x64x8x3  128x64x8x3  128x32x8x3  64x64x8x2   64x32x8x2
    crowded  dkdv    32x64x8x2   32x64x8x2   16x64x8x1   16x64x8x1   16x16x8x1
    crowded  dq      64x64x8x2   64x64x8x2   64x32x8x2   64x64x8x2   32x32x8x1
    crowded  fused   32x64x8x1   32x64x8x1   32x64x8x2   32x32x8x1   16x16x8x1
    small    forward 64x64x4x2   64x64x4x2   64x64x8x2   64x64x8x2   64x32x8x2
    small    dkdv    32x64x8x2   32x64x8x2   32x64x8x1   16x32x8x1   16x16x8x1
    small    dq      64x64x8x2   64x64x8x2   64x32x8x2   64x32x8x2   16x32x8x1
    small    fused   32x64x8x1   32x64x8x1   32x64x8x2   16x32x8x1   16x16x8x1
""")  # fmt: skip

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
    width, tables = tile_width(D), tables_for(major)
    if itemsize == 4:  # products are exact fp32 (no TF32) and run without tensor cores: right, not fast
        return Tile(16, 16, 4, 1) if width == 256 else Tile(32, 32, 4, 1)
    if small:
        name = "small"
    elif tables.tma and not described:
        name = "pointers"
    else:
        name = "crowded" if crowded or width != D else "plain"
    return replace(tables.tiles[name, kind, width], tma=tables.tma and described)


def capability(device: torch.device) -> int:
    """The major compute capability."""
    return torch.cuda.get_device_capability(device)[0]
