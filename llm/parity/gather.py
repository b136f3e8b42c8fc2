"""A layout's gradients and state as global tensors on rank 0: no engine's own notion of where they are is trusted.

Tensors travel one at a time and nothing is pickled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from llm.checkpoint.manifest import Piece
from llm.parallel.agreement import backend_device, exchange
from llm.slices import Slice
from llm.train.engines.base import Engine

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
State: TypeAlias = dict[tuple[str, str], Tensor]
"""By (parameter, kind): fp32 on the CPU, in the global shape."""


class Gathered:
    """A state as an engine reads it (WeightSource)."""

    def __init__(self, state: State) -> None:
        self.state = state

    def read_slice(self, name: str, kind: str, part: Slice) -> Tensor:
        return part.take(self.state[name, kind]).clone()  # the engine may keep it as its own


def shared_names(names: Iterable[str], expected: Iterable[str]) -> tuple[list[str], list[str]]:
    """The expected names that every rank has, and what is wrong with the rest. Collective."""
    expected, names = list(expected), set(names)
    here = torch.tensor([name in names for name in expected], dtype=torch.int32)
    here = _everywhere(here, dist.ReduceOp.MIN)
    missing = [name for name, found in zip(expected, here, strict=True) if not found]
    problems = [f"{name}: the oracle has this parameter, the layout does not" for name in missing]
    problems += [f"{name}: the layout has this parameter, the oracle does not" for name in names - set(expected)]
    return [name for name in expected if name not in missing], told(problems)


def gather_gradients(engine: Engine, names: Sequence[str]) -> dict[str, Tensor]:
    """Every accumulated gradient on rank 0, nothing on the others. Collective."""
    gradients = {}
    for name in names:
        gradient = engine.gradient(name)
        if dist.get_rank() == 0:
            gradients[name] = gradient.detach().float().clone()
    return gradients


def gather_state(pieces: Iterable[Piece], shapes: Shapes, kinds: Sequence[str]) -> tuple[State, list[str]]:
    """Master weights and moments on rank 0 (nothing on the others), and what is wrong with the ranks' pieces of them.

    Every element of every tensor must be in exactly one piece. A sum over ranks of tensors that are zero elsewhere is
    then exact; a second sum counts. Collective.
    """
    held: dict[tuple[str, str], list[Piece]] = {}
    for piece in pieces:
        held.setdefault((piece.name, piece.kind), []).append(piece)
    strange = {key for key in held if key[0] not in shapes or key[1] not in kinds}
    problems = [f"{name} ({kind}): a piece that was not expected" for name, kind in strange]
    state: State = {}
    for name, shape in shapes.items():
        for kind in kinds:
            values, counts = torch.zeros(shape), torch.zeros(shape, dtype=torch.uint8)
            for piece in held.get((name, kind), []):
                problem = _place(piece, values, counts)
                problems += [f"{name} ({kind}): {problem}"] if problem else []
            values, counts = _everywhere(values), _everywhere(counts)
            if dist.get_rank() == 0:
                state[name, kind] = values
                problems += [f"{name} ({kind}): {text}" for text in _uncovered(counts)]
    return state, told(problems)


def _place(piece: Piece, values: Tensor, counts: Tensor) -> str | None:
    """Add a piece to the global tensor and its elements to the counts; what is wrong with it."""
    part, stop = piece.slice, piece.start + piece.data.numel()
    if part.global_shape != tuple(values.shape):
        return f"a piece of a tensor of shape {part.global_shape}; expected {tuple(values.shape)}"
    if piece.start < 0 or stop > part.numel:
        return f"a piece of elements {piece.start} to {stop} of a slice of {part.numel}"
    for target, data in ((values, piece.data.float()), (counts, torch.ones(len(piece.data), dtype=torch.uint8))):
        flat = torch.zeros(part.numel, dtype=target.dtype)
        flat[piece.start : stop] = data
        part.take(target).add_(flat.view(part.shape))
    return None


def _uncovered(counts: Tensor) -> list[str]:
    none, many = int((counts == 0).sum()), int((counts > 1).sum())
    texts = ((none, "in no rank's state"), (many, "in more than one piece"))
    return [f"{n} of {counts.numel()} elements are {where}" for n, where in texts if n]


def _everywhere(tensor: Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """A CPU tensor reduced over all ranks, through the device that their backend can see."""
    there = tensor.to(backend_device())
    dist.all_reduce(there, operation)
    return there.cpu()


def told(problems: Sequence[str]) -> list[str]:
    """Every rank's problems, each once, the same on all ranks; a rank tells 4096 bytes. Collective."""
    texts = exchange("\n".join(sorted(problems)) or None)
    return list(dict.fromkeys(line for text in texts if text for line in text.split("\n")))
