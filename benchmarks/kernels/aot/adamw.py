"""The AdamW kernel."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.kernels.aot.compile import Case
from kernels.adamw import BLOCK, WARPS, adamw_kernel

SCALARS = ("step", "lr", "decay", "rest1", "beta2", "rest2", "eps", "log_beta1", "log_beta2")
TYPES = dict.fromkeys(SCALARS, "fp32") | {"scale_ptr": "*fp32", "step_ptr": "*fp32"}
DROPPED = {"bf16": 16, "fp16": 13}


def adamw_case(parameter: str, gradient: str, low: str | None, stochastic: bool, scalars: bool) -> Case:
    """scalars: the step and the gradient's scale are on the device, and N is past 2^31."""
    rounded = low or parameter
    types = TYPES | {"gradient_ptr": f"*{gradient}", "low_ptr": f"*{low}", "N": "i64" if scalars else "i32"}
    absent = {} if scalars else {"scale_ptr": None, "step_ptr": None}
    if low is None:
        absent["low_ptr"] = None
    constants = {"BLOCK": BLOCK, "DROPPED": DROPPED[rounded] if stochastic else 0, **absent}
    name = f"adamw {parameter} gradient {gradient}{f' copy {low}' if low else ''}"
    name += " stochastic" * stochastic + " scalars on the device" * scalars
    return Case(name, adamw_kernel, parameter, constants, types, WARPS)


def cases(arch: int) -> Iterator[Case]:
    kinds = [("fp32", "fp32", None)]
    for low in ("bf16", "fp16"):
        kinds += [("fp32", low, None), ("fp32", low, low), ("fp32", "fp32", low), (low, low, None)]
    for parameter, gradient, low in kinds:
        for stochastic in (False, True) if (low or parameter) != "fp32" else (False,):
            for scalars in (False, True):
                yield adamw_case(parameter, gradient, low, stochastic, scalars)
