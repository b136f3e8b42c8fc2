"""The dropout kernel."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.kernels.aot.compile import Case
from kernels.dropout import COLS, ROWS, dropout_kernel

TYPES = {"samples_ptr": "*i64", "positions_ptr": "*i64", "keep_scale": "fp32"}


def cases(arch: int) -> Iterator[Case]:
    for dtype in ("bf16", "fp16", "fp32"):
        for C in (768, 1600, 8192):
            for residual in (False, True):
                constants = {"C": C, "ROWS": ROWS, "COLS": COLS, "HAS_RESIDUAL": residual}
                none = {} if residual else {"residual_ptr": None}
                name = f"dropout {dtype} C={C}{' residual' * residual}"
                yield Case(name, dropout_kernel, dtype, constants | none, TYPES)
