"""Which keys a query sees in block-sparse attention."""

from __future__ import annotations

from dataclasses import dataclass

from kernels.dispatch import expect

LEAST_BLOCK = 64  # tiles of keys divide it


@dataclass(frozen=True)
class Strided:
    """The strided pattern of Sparse Transformers (Child et al. 2019, section 4.3), in blocks of positions.

    A query in block row i = position // block sees the keys in block j = key // block, j <= i, if i - j < local or
    (i - j) % stride == 0; inside the diagonal block it sees the keys up to its own position. block: a positive
    multiple of 64. local, stride: at least 1. Raises KernelError outside these ranges.
    """

    block: int
    local: int
    stride: int

    def __post_init__(self) -> None:
        expect(
            self.block > 0 and self.block % LEAST_BLOCK == 0,
            f"sparse: found block = {self.block}, expected a positive multiple of {LEAST_BLOCK}",
        )
        for name, value in (("local", self.local), ("stride", self.stride)):
            expect(value >= 1, f"sparse: found {name} = {value}, expected at least 1")
