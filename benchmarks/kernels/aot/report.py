"""Every kernel's cases, and the report on one of them.

A file of its own so that other processes can import it: add a family of kernels to FAMILIES here.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.kernels.aot import adamw, attention, cross_entropy, dropout, embedding, gelu, norm, rope, swiglu
from benchmarks.kernels.aot.compile import Case, compile_case

FAMILIES = (attention, norm, dropout, adamw, gelu, swiglu, embedding, rope, cross_entropy)


def cases(arch: int) -> Iterator[Case]:
    for family in FAMILIES:
        yield from family.cases(arch)


def report_of(arch: int, name: str) -> tuple[str, bool]:
    """The report's line on the case of that name, and whether it fits."""
    report = compile_case(next(case for case in cases(arch) if case.name == name), arch)
    return str(report), report.fits
