"""The options of attention, and the arguments that they become in the kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from kernels.dispatch import expect
from kernels.philox import DropoutKey, signed

LOG2_E = math.log2(math.e)
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


@dataclass(frozen=True)
class Options:
    """The arguments of `attention` that are not tensors. softcap 0: none."""

    window: int | None = None
    sparse: Strided | None = None
    softcap: float = 0.0
    key: DropoutKey | None = None
    head_offset: int = 0
    deterministic: bool = True


def scalars(options: Options, D: int, Tk: int) -> tuple[int, float, float, float, int, int, int, int]:
    """(window, scale, cap, 1 / (1 - p), seed, site, threshold, head_offset) as the kernels take them.

    scale: of q k^T to a score in base 2, or with softcap to the argument of tanh_of_half, whose value times cap is it.
    """
    window = Tk if options.window is None else min(options.window, Tk)
    scale, cap = LOG2_E / math.sqrt(D), LOG2_E * options.softcap
    if options.softcap > 0:
        scale *= 2 / options.softcap
    key = options.key
    if key is None:
        return window, scale, cap, 1.0, 0, 0, 0, 0
    seed, site, threshold = signed(key.seed), signed(key.site), signed(key.threshold)
    return window, scale, cap, 1 / (1 - key.p), seed, site, threshold, options.head_offset


def flags(options: Options, cu_seqlens: Tensor | None) -> tuple[bool, bool, bool, int, int, int]:
    """DROPOUT, SOFTCAP, BOUNDED, SPARSE (the block, 0 if dense), LOCAL, STRIDE."""
    dropout, softcap = options.key is not None, options.softcap > 0
    bounded = options.window is not None or cu_seqlens is not None
    if options.sparse is None:
        return dropout, softcap, bounded, 0, 1, 1
    return dropout, softcap, bounded, options.sparse.block, options.sparse.local, options.sparse.stride
