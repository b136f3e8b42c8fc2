"""The GELU kernels."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.kernels.aot.compile import Case
from kernels.gelu import gelu_backward_kernel, gelu_forward_kernel, tile_of

WIDTHS = (64, 3072)


def cases(arch: int) -> Iterator[Case]:
    tiles = sorted({tile_of(1, 1 << 20), *(tile_of(2, F) for F in WIDTHS)})
    for dtype in ("bf16", "fp16", "fp32"):
        for rows, columns in tiles:
            constants = {"ROWS": rows, "COLS": columns}
            name = f"{dtype} {rows}x{columns}"
            yield Case(f"gelu forward {name}", gelu_forward_kernel, dtype, constants)
            yield Case(f"gelu backward {name}", gelu_backward_kernel, dtype, constants)
