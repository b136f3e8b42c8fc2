"""The bias and GELU kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.kernels.aot.compile import Case
from kernels.gelu import gelu_backward_kernel, gelu_forward_kernel, tile_of

WIDTHS = (64, 3072)
TYPES = {"dbias_ptr": "*fp32"}


def cases(arch: int) -> Iterator[Case]:
    tiles = [(False, tile_of(1, 1 << 20)), *((bias, tile_of(2, F)) for F in WIDTHS for bias in (False, True))]
    for dtype in ("bf16", "fp16", "fp32"):
        for bias, (rows, columns) in tiles:
            constants: dict[str, Any] = {"ROWS": rows, "COLS": columns, "HAS_BIAS": bias}
            constants |= {} if bias else {"bias_ptr": None}
            name = f"{dtype} {rows}x{columns}{' bias' * bias}"
            yield Case(f"bias_gelu forward {name}", gelu_forward_kernel, dtype, constants)
            yield Case(
                f"bias_gelu backward {name}", gelu_backward_kernel, dtype, constants | {"HAS_DBIAS": bias}, TYPES
            )
            if bias:
                frozen = constants | {"HAS_DBIAS": False}
                yield Case(f"bias_gelu backward {name} frozen", gelu_backward_kernel, dtype, frozen, TYPES)
