"""What decides the code of a pass's kernels and their arguments, beyond addresses: the key of their launch plans."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.attention import tiles
from kernels.attention.options import LOG2_E, MOST_SOFTCAP, Options
from kernels.attention.tiles import SHORT, Tile, tile_for, tile_width
from kernels.dispatch import INTERPRETED
from kernels.plan import Layout


class Problem(NamedTuple):
    """Shapes of q and k; strides of all inputs; whether their addresses are multiples of 16; the rest as forms take it.

    documents: whether their bounds are given.
    """

    q: torch.Size
    k: torch.Size
    strides: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    device: torch.device
    aligned: bool
    options: Options
    documents: bool

    @classmethod
    def of(cls, options: Options, documents: bool, *inputs: Tensor) -> "Problem":
        """inputs: q, k, v and in the backward pass do, which `readable` returned."""
        q, k, *_ = inputs
        aligned = all([x.data_ptr() % 16 == 0 for x in inputs])  # noqa: C419 - half the time of a generator
        strides = tuple([x.stride() for x in inputs])
        return cls(q.shape, k.shape, strides, q.dtype, q.device, aligned, options, documents)

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """B, Tq, Tk, H, K, D."""
        (B, Tq, H, D), (_, Tk, K, _) = self.q, self.k
        return B, Tq, Tk, H, K, D

    @property
    def described(self) -> bool:
        """Whether TMA descriptors can stand for the inputs as they lie in memory."""
        D, itemsize = self.q[3], self.dtype.itemsize
        return self.aligned and 0 not in (*self.q, *self.k) and tile_width(D) == D and all(
            strides[3] == 1 and all(stride > 0 and stride * itemsize % 16 == 0 for stride in strides[:3])
            for strides in self.strides
        )  # fmt: skip

    @property
    def numbers(self) -> tuple[float, ...]:
        """(window, scale, cap, 1 / (1 - p), seed, site, threshold, head_offset) as the kernels take them.

        scale: of q k^T to a score in base 2, or with softcap to what tanh_of_half takes; its value times cap is it.
        """
        options, Tk = self.options, self.k[1]
        window = Tk if options.window is None else min(options.window, Tk)
        softcap = min(options.softcap, MOST_SOFTCAP)
        scale, cap = LOG2_E / math.sqrt(self.q[3]), LOG2_E * softcap
        if softcap > 0:
            scale *= 2 / softcap
        dropout = (1.0, 0, 0, 0, 0) if options.key is None else (*options.key.numbers, options.head_offset)
        return window, scale, cap, *dropout

    @property
    def flags(self) -> tuple[int, ...]:
        """DROPOUT, SOFTCAP, BOUNDED, SPARSE (the block, 0 if dense), LOCAL, STRIDE."""
        options, sparse = self.options, self.options.sparse
        switched = options.key is not None, options.softcap > 0, options.window is not None or self.documents
        return *switched, *((0, 1, 1) if sparse is None else (sparse.block, sparse.local, sparse.stride))

    def tile(self, kind: str) -> Tile:
        """The tile of `kind` (one of KINDS) on the device."""
        if INTERPRETED:
            return tiles.INTERPRETER
        dropout, softcap, _, sparse, *_ = self.flags
        return tile_for(
            kind, self.q[3], self.dtype.itemsize, tiles.capability(self.device),
            crowded=bool(dropout or softcap), small=sparse > 0 or self.q[1] <= SHORT, described=self.described,
        )  # fmt: skip

    def origin(self, tile: Tile) -> int:
        """The position where the first tile of queries begins (walk.py)."""
        first = self.k[1] - self.q[1]
        return first if self.options.sparse is None else first // tile.block_m * tile.block_m

    def section(self, head_bytes: int, group: int) -> int:
        """How many heads run together, a multiple of `group`: those whose `head_bytes` fit the device's L2 cache."""
        l2 = tiles.INTERPRETER_L2 if INTERPRETED else tiles.tables_for(tiles.capability(self.device)).l2
        return section_of(l2, head_bytes, group)

    def layouts(self, tile: Tile) -> list[Layout]:
        """How the inputs lie, if `tile` loads them through descriptors."""
        if not tile.tma:
            return []
        rows = (tile.block_m, tile.block_n, tile.block_n, tile.block_m)
        found = []
        shapes = (self.q, self.k, self.k, self.q)
        for (sb, st, sh, sd), (B, T, heads, D), height in zip(self.strides, shapes, rows, strict=False):
            # The sides of length 1 stand first: only then does Triton copy tiles straight to where the products read.
            found.append(Layout((B, heads, T, D), (sb, sh, st, sd), (1, 1, height, D)))
        return found


def section_of(l2: int, head_bytes: int, group: int) -> int:
    """`Problem.section` for a cache of l2 bytes."""
    fit = max(1, l2 // max(1, head_bytes))
    return (1 << (fit.bit_length() - 1)) * group


def head_strides(*strides: tuple[int, ...]) -> list[int]:
    """Of batch, row and head of each, as the kernels take them."""
    return [stride for each in strides for stride in each[:3]]
