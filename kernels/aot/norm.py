"""The normalisation kernels."""

from __future__ import annotations

from collections.abc import Iterator

from kernels.aot.compile import Case
from kernels.layer_norm import layer_norm_backward_kernel, layer_norm_forward_kernel, tile_of

ROW_WIDTHS = (128, 768, 1600, 4096, 8192)
TYPES = {
    "mean_ptr": "*fp32", "rstd_ptr": "*fp32", "dweight_ptr": "*fp32", "dbias_ptr": "*fp32", "eps": "fp32",
}  # fmt: skip


def cases(arch: int) -> Iterator[Case]:
    for C in ROW_WIDTHS:
        rows, width, warps = tile_of(C)
        for dtype in ("bf16", "fp16", "fp32"):
            for bias in (False, True):
                constants = {"C": C, "ROWS": rows, "WIDTH": width, "HAS_BIAS": bias}
                no_bias = {} if bias else {"bias_ptr": None}
                for kind, kernel in (
                    ("forward", layer_norm_forward_kernel),
                    ("backward", layer_norm_backward_kernel),
                ):
                    name = f"layer_norm {kind} {dtype} C={C}{' bias' * bias}"
                    extra = no_bias if kind == "forward" else {}
                    yield Case(name, kernel, dtype, constants | extra, TYPES, warps)
