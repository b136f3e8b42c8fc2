"""The attention kernels with the tiles that they run with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kernels.aot.compile import Case
from kernels.attention import backward, forward
from kernels.attention.tiles import Tile, tile_for, tile_width

HEAD_WIDTHS = (16, 32, 40, 64, 80, 96, 128, 192, 256)
TYPES = {
    "lse_ptr": "*fp32", "delta_ptr": "*fp32", "samples_ptr": "*i64", "scale": "fp32", "keep_scale": "fp32",
}  # fmt: skip


def attention_case(kind: str, kernel: Any, dtype: str, D: int, tile: Tile, dropout: bool) -> Case:
    constants: dict[str, Any] = {
        "D": D,
        "WIDTH": tile_width(D),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
    }
    constants["DROPOUT"] = dropout
    if not dropout:
        constants["samples_ptr"] = None
    name = f"attention {kind} {dtype} D={D} {tile.block_m}x{tile.block_n} w{tile.warps} s{tile.stages}"
    return Case(name + " dropout" * dropout, kernel, dtype, constants, TYPES, tile.warps, tile.stages, dtype == "fp32")


def cases(arch: int) -> Iterator[Case]:
    """Every attention kernel with the tile that it runs with on `arch`."""
    kernels = {
        "forward": forward.attention_forward_kernel,
        "dkdv": backward.attention_dkdv_kernel,
        "dq": backward.attention_dq_kernel,
    }
    for D in HEAD_WIDTHS:
        for dtype, itemsize in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
            for kind, kernel in kernels.items():
                for dropout in (False, True):
                    tile = tile_for(kind, D, itemsize, arch // 10, dropout)
                    yield attention_case(kind, kernel, dtype, D, tile, dropout)
            constants = {"D": D, "WIDTH": tile_width(D), "BLOCK_M": backward.DELTA_ROWS}
            kernel = backward.attention_delta_kernel
            yield Case(f"attention delta {dtype} D={D}", kernel, dtype, constants, TYPES)
