"""The options of attention, and the arguments that they become in the kernels."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from kernels.dispatch import expect
from kernels.philox import DropoutKey

LOG2_E = math.log2(math.e)
LEAST_BLOCK = 64  # tiles of keys divide it
MOST_POSITIONS = 2**29  # of a pattern: sums of a few stay within 32 bits
MOST_SOFTCAP = 1e30  # a larger one moves no score, but its inverse is not a normal fp32 number


@dataclass(frozen=True)
class Strided:
    """The strided pattern of Sparse Transformers (Child et al. 2019, section 4.3), in blocks of positions.

    A query in block row i = position // block sees the keys in block j = key // block, j <= i, if i - j < local or
    (i - j) % stride == 0; inside the diagonal block it sees the keys up to its own position. block: a positive
    multiple of 64. local, stride: at least 1, and at most 2^29 positions. Raises KernelError outside these ranges.
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
            expect(
                value * self.block <= MOST_POSITIONS,
                f"sparse: found {name} = {value} blocks of {self.block}, expected at most 2^29 positions: as many "
                f"blocks as the longest row has do the same",
            )


class Options(NamedTuple):
    """The arguments of `attention` that are not tensors. softcap 0: none. gluon: the form, else Triton's."""

    window: int | None = None
    sparse: Strided | None = None
    softcap: float = 0.0
    key: DropoutKey | None = None
    head_offset: int = 0
    deterministic: bool = True
    gluon: bool = False
