"""The SwiGLU kernels."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.kernels.aot.compile import Case
from kernels.swiglu import swiglu_backward_kernel, swiglu_forward_kernel, tile_of

# Rows and width of the result: a flattened tensor, common widths, and one narrower than a tile.
SHAPES = ((1, 1 << 20), (2, 64), (2, 2048), (2, 11008))
ITEMSIZES = {"bf16": 2, "fp16": 2, "fp32": 4}


def cases(arch: int) -> Iterator[Case]:
    kernels = {"forward": swiglu_forward_kernel, "backward": swiglu_backward_kernel}
    tiles = sorted({tile_of(M, width) for M, width in SHAPES})
    for kind, kernel in kernels.items():
        for dtype, itemsize in ITEMSIZES.items():
            for rows, columns in tiles:
                constants = {"ROWS": rows, "COLS": columns, "VECTOR": 8 // itemsize}
                yield Case(f"swiglu {kind} {dtype} {rows}x{columns}", kernel, dtype, constants)
