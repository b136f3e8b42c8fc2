"""The normalisation kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.kernels.aot.compile import Case
from kernels.norm.backward import (
    SUM_COLS,
    SUM_ROWS,
    norm_backward_kernel,
    projections_kernel,
    sum_partials_kernel,
)
from kernels.norm.forward import norm_forward_kernel
from kernels.norm.tiles import MEAN_COLS, column_blocks, forward_tile

WIDTHS = (128, 768, 1600, 2048, 4096, 5120, 8192, 16384)
# (operation, RMS, HAS_BIAS)
LAYER, PLAIN_LAYER, RMS = ("layer_norm", False, True), ("layer_norm", False, False), ("rms_norm", True, False)
# (its name, adds to a stream, DROPOUT)
ALONE, ADD, DROPOUT = ("", False, False), (" add", True, False), (" add dropout", True, True)
FP32 = ("mean_ptr", "rstd_ptr", "partials_ptr", "projections_ptr")
TYPES = dict.fromkeys(FP32, "*fp32") | {
    "samples_ptr": "*i64", "positions_ptr": "*i64", "eps": "fp32", "keep_scale": "fp32",
}  # fmt: skip
OWN_WEIGHTS = {"weight_ptr": "*fp32", "bias_ptr": "*fp32", "out_ptr": "*fp32"}

Flags = dict[str, Any]


def absent(**present: bool) -> Flags:
    """The pointers of a call that are None."""
    return {f"{name}_ptr": None for name, there in present.items() if not there}


def cases(arch: int) -> Iterator[Case]:
    for C in WIDTHS:
        for kind in (LAYER, RMS):
            for fusion in (ALONE, ADD, DROPOUT):
                yield from _both("bf16", C, kind, fusion)
        for dtype in ("fp16", "fp32"):
            yield from _both(dtype, C, LAYER, DROPOUT)
            yield from _both(dtype, C, RMS, ALONE)
        for kind in (PLAIN_LAYER, LAYER, RMS) if C == 768 else ():
            yield from _both("bf16", C, kind, ADD, OWN_WEIGHTS, " fp32 weights")
        for rms in (False, True) if column_blocks(C, False)[1] > 1 else ():
            constants = {"C": C, "COLS": MEAN_COLS, "RMS": rms} | absent(mean=not rms)
            which = f"{'rms' if rms else 'layer'}_norm projections bf16 C={C}"
            yield Case(which, projections_kernel, "bf16", constants, TYPES, 16)
    for dtype in ("bf16", "fp16", "fp32"):
        constants = {"N": 768, "ROWS": SUM_ROWS, "COLS": SUM_COLS}
        yield Case(f"norm partial sums {dtype}", sum_partials_kernel, dtype, constants, TYPES)


def _both(
    dtype: str, C: int, kind: tuple[str, bool, bool], fusion: tuple[str, bool, bool],
    weights: dict[str, str] | None = None, suffix: str = "",
) -> Iterator[Case]:  # fmt: skip
    """Forward and backward."""
    (op, rms, bias), (added, add, dropout) = kind, fusion
    flags = {"C": C, "RMS": rms, "HAS_BIAS": bias, "DROPOUT": dropout}
    flags |= absent(samples=dropout, positions=dropout)
    for part, case in (("forward", _forward), ("backward", _backward)):
        name = f"{op} {part} {dtype} C={C}{added}{suffix}{' bias' * bias}"
        yield case(name, dtype, C, flags, add, TYPES | (weights or {}))


def _forward(name: str, dtype: str, C: int, flags: Flags, add: bool, types: dict[str, str]) -> Case:
    flags = flags | {"ADD": add} | absent(bias=bool(flags["HAS_BIAS"]), residual=add)
    tile = forward_tile(C, bool(flags["DROPOUT"]))
    sides = {"ROWS": tile.rows, "COLS": tile.cols, "CHUNKS": tile.chunks}
    return Case(name, norm_forward_kernel, dtype, flags | sides, types, tile.warps, may_spill=dtype == "fp32")


def _backward(name: str, dtype: str, C: int, flags: Flags, add: bool, types: dict[str, str]) -> Case:
    tile, blocks = column_blocks(C, bool(flags["DROPOUT"]))
    flags = flags | {"HAS_DSTREAM": add, "WIDE": blocks > 1} | absent(dstream=add, projections=blocks > 1)
    sides = {"ROWS": tile.rows, "COLS": tile.cols, "CHUNKS": tile.chunks}
    return Case(name, norm_backward_kernel, dtype, flags | sides, types, tile.warps, may_spill=dtype == "fp32")
