"""The kernels of the embedding's gradient."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.kernels.aot.compile import Case
from kernels.embedding import CHUNK, ROWS, embedding_joined_kernel, embedding_pieces_kernel, tile_of

TYPES = {"ids_ptr": "*i32", "order_ptr": "*i64", "partial_ptr": "*fp32"}


def cases(arch: int) -> Iterator[Case]:
    for C in (128, 768, 1600, 4096):
        cols, tiles = tile_of(C)
        constants = {"C": C, "CHUNK": CHUNK, "ROWS": ROWS, "COLS": cols, "TILES": tiles}
        for dtype in ("bf16", "fp16", "fp32"):
            for kind, kernel in (("pieces", embedding_pieces_kernel), ("joined", embedding_joined_kernel)):
                yield Case(f"embedding {kind} {dtype} C={C}", kernel, dtype, constants, TYPES)
