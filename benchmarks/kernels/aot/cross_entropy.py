"""The cross-entropy kernels with the tiles that they run with."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.kernels.aot.compile import Case
from kernels.cross_entropy.rows import (
    cross_entropy_backward_kernel,
    cross_entropy_forward_kernel,
    scale_rows_kernel,
    tile_of,
)

VOCABULARIES = (256, 2048, 8192, 32000, 50304, 128256)
TYPES = {
    "targets_ptr": "*i64", "value_ptr": "*fp32", "log_sum_ptr": "*fp32", "grad_ptr": "*fp32", "factor_ptr": "*fp32",
    "z_loss": "fp32", "softcap": "fp32",
}  # fmt: skip


def cases(arch: int) -> Iterator[Case]:
    """Losses alone, losses with their gradient, what a part of the vocabulary needs, and the backward passes."""
    for V in VOCABULARIES:
        lanes, warps = tile_of(V)
        for dtype in ("bf16", "fp16", "fp32"):
            for softcap in (False, True):
                constants = {"LANES": lanes, "SOFTCAP": softcap}
                name = f"{dtype} V={V}{' softcap' * softcap}"
                for kind, loss, gradient in (("losses", True, False), ("fused", True, True), ("part", False, False)):
                    yield Case(
                        f"cross_entropy {kind} {name}", cross_entropy_forward_kernel, dtype,
                        constants | {"LOSS": loss, "GRADIENT": gradient}, TYPES, warps,
                    )  # fmt: skip
                for grad in (False, True):
                    yield Case(
                        f"cross_entropy backward {name}{' grad' * grad}", cross_entropy_backward_kernel, dtype,
                        constants | {"HAS_GRAD": grad} | ({} if grad else {"grad_ptr": None}), TYPES, warps,
                    )  # fmt: skip
            yield Case(f"cross_entropy scale {dtype} V={V}", scale_rows_kernel, dtype, {"LANES": lanes}, TYPES, warps)
