"""A tiny model, cut as tensor parallelism and ZeRO cut it, and saved by threads as ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from states import state_of
from thread_ranks import on_thread_ranks
from torch import Tensor

from llm.checkpoint.manifest import KINDS, Piece
from llm.checkpoint.reader import CheckpointReader
from llm.checkpoint.writer import write_checkpoint
from llm.slices import Slice

# Global shape, and the dimension that tensor parallelism cuts (None: every rank holds it whole).
MODEL = {
    "embedding.weight": ((11, 4), 0),  # 11 does not divide: the last rank's slice is short
    "blocks.0.up.weight": ((12, 4), 0),
    "blocks.0.up.bias": ((12,), 0),
    "blocks.0.down.weight": ((4, 12), 1),
    "blocks.0.cube": ((3, 8, 5), 1),
    "norm.weight": ((4,), None),
    "scale": ((), None),
}
Tensors = dict[tuple[str, str], Tensor]


def make_tensors(seed: int) -> Tensors:
    """Random master weights and moments of MODEL."""
    generator = torch.Generator().manual_seed(seed)
    return {
        (name, kind): torch.randn(shape, generator=generator) for name, (shape, _) in MODEL.items() for kind in KINDS
    }


def slice_of(name: str, tp_rank: int, tp: int) -> Slice:
    """What rank tp_rank of tp holds: equal parts rounded up, so the last may be short."""
    shape, dim = MODEL[name]
    if dim is None:
        return Slice.full(shape)
    part = -(-shape[dim] // tp)
    return Slice(shape, dim, tp_rank * part, min((tp_rank + 1) * part, shape[dim]))


def pieces_of(tensors: Tensors, rank: int, tp: int, dp: int) -> Iterator[Piece]:
    """As ZeRO does: a TP rank's slices lie one after the other and are cut in dp equal parts."""
    dp_rank, tp_rank = divmod(rank, tp)
    names = [name for name in MODEL if MODEL[name][1] is not None or tp_rank == 0]
    slices = {name: slice_of(name, tp_rank, tp) for name in names}
    part = -(-sum(piece.numel for piece in slices.values()) // dp)
    low, high = dp_rank * part, (dp_rank + 1) * part
    for kind in KINDS:
        position = 0
        for name, piece in slices.items():
            start = max(low - position, 0)
            stop = min(high - position, piece.numel)
            position += piece.numel
            if start < stop:
                flat = piece.take(tensors[name, kind]).reshape(-1)
                yield Piece(name, kind, piece, start, flat[start:stop])


def save(
    root: Path,
    step: int,
    tensors: Tensors,
    *,
    tp: int = 1,
    dp: int = 1,
    keep_last: int = 2,
    pieces: Callable[[Tensors, int, int, int], Iterator[Piece]] = pieces_of,
    state: dict[str, Any] | None = None,
    **options: Any,
) -> list[Any]:
    """Save with tp * dp ranks; each rank's result or exception."""
    return on_thread_ranks(
        tp * dp,
        lambda rank: write_checkpoint(
            root,
            step,
            pieces(tensors, rank, tp, dp),
            state_of(step, skipped_samples=rank) if state is None else state,
            keep_last=keep_last,
            **options,
        ),
    )


def same(reader: CheckpointReader, tensors: Tensors) -> bool:
    """Whether the checkpoint holds these tensors, to the bit."""
    return all(torch.equal(reader.read(*key), tensor) for key, tensor in tensors.items())
