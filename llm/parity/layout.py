"""Runs the layout that is compared, and gathers each of its steps on rank 0 for the oracle."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from llm.checkpoint.manifest import Piece
from llm.config import RunConfig
from llm.config.matrices import moments_of
from llm.parallel.agreement import backend_device, exchange
from llm.parallel.mesh import Mesh
from llm.parity.batches import micro_batches, target_count
from llm.slices import Slice, slice_of
from llm.train.build import build_engine, build_model
from llm.train.engines.base import MicroBatch
from llm.train.guard import compare_replicas

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
State: TypeAlias = dict[tuple[str, str], Tensor]
"""By (parameter, kind): fp32 on the CPU, in the global shape."""


@dataclass(frozen=True)
class StepRecord:
    """One step of the layout; its tensors are global, and on rank 0 alone."""

    number: int
    """Counted from 1."""
    before: State
    """Master weights, and moments if there were updates, before the step."""
    scalars_before: dict[str, Any]
    """Engine.scalar_state before the step."""
    loss: float
    gradients: dict[str, Tensor]
    grad_norm: float
    skipped: bool
    after: State


def global_shapes(config: RunConfig, *, trained: bool = False) -> Shapes:
    """The global shape of every parameter, by name; or of those that are trained."""
    with torch.device("meta"):
        model = build_model(config, None)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad or not trained}
    return {name: slice_of(parameter).global_shape for name, parameter in parameters.items()}


class Layout:
    """The engine, built as a run builds it, and its state on rank 0. Every method is collective."""

    def __init__(self, config: RunConfig, mesh: Mesh, device: torch.device) -> None:
        self.config, self.mesh, self.device = config, mesh, device
        self.shapes = global_shapes(config)
        self.engine = build_engine(config, mesh, device)
        # The schedule is no layout's; at its peak an update is large enough to be seen in a weight.
        self.engine.set_lr(config.optim.lr)
        self.problems: list[str] = []
        """What is wrong beyond numbers, the same on every rank."""
        self.frozen = self.shapes.keys() - global_shapes(config, trained=True).keys()
        self.names, missing = shared_names(self.engine.parameters, self.shapes)
        self.note(missing)
        self.updates = 0
        self.state = self._gather()

    def note(self, problems: Sequence[str]) -> None:
        self.problems += [problem for problem in problems if problem not in self.problems]

    def step(self, number: int) -> StepRecord:
        before, scalars = self.state, self.engine.scalar_state()
        loss = float(self.engine.forward_backward(self._batches(number), target_count(self.config)))
        gradients = {}
        for name in self.names:
            if name in self.frozen:
                continue
            gradient = self.engine.gradient(name)  # every rank has a part in it
            if self.mesh.rank == 0:
                gradients[name] = gradient.detach().float().clone()
        result = self.engine.step()
        grad_norm, skipped = float(result.grad_norm), bool(result.skipped)
        for name, value in (("loss", loss), ("grad_norm", grad_norm), ("skipped", skipped)):
            found = exchange(repr(value))
            if len(set(found)) > 1:
                self.note([f"step {number}: ranks differ in {name}: {', '.join(map(str, found))}"])
        self.note([f"step {number}: {finding}" for finding in compare_replicas(self.engine, self.mesh)])
        self.updates += not skipped
        self.state = self._gather()
        return StepRecord(number, before, scalars, loss, gradients, grad_norm, skipped, self.state)

    def validation_loss(self, number: int) -> float:
        total, count = self.engine.evaluate(self._batches(number))
        return total / count if count else math.nan

    def _batches(self, number: int) -> list[MicroBatch]:
        mesh = self.mesh
        return micro_batches(self.config, number, self.device, dp_rank=mesh.dp_rank, dp_size=mesh.dp_size)

    def _gather(self) -> State:
        trained = (name for name in self.shapes if name not in self.frozen)
        moments = {name: moments_of(name, self.config.optim) for name in trained} if self.updates else {}
        state, problems = gather_state(self.engine.state_pieces(), self.shapes, moments)
        self.note(problems)
        return state


# --- state as global tensors on rank 0 ---
#
# No engine is asked which elements it holds: every piece says so itself. Tensors travel one at a time.


class Gathered:
    """A gathered state as the WeightSource that an engine loads from."""

    def __init__(self, state: State) -> None:
        self.state = state

    def read_slice(self, name: str, kind: str, part: Slice) -> Tensor:
        return part.take(self.state[name, kind]).clone()  # the engine may keep it as its own


def shared_names(names: Iterable[str], expected: Iterable[str]) -> tuple[list[str], list[str]]:
    """The expected names that every rank has, and what is wrong with the rest. Collective."""
    expected, names = list(expected), set(names)
    present = torch.tensor([name in names for name in expected], dtype=torch.int32)
    on_all = _all_reduce(present, dist.ReduceOp.MIN)
    missing = [name for name, found in zip(expected, on_all, strict=True) if not found]
    problems = [f"{name}: the oracle has this parameter, the layout does not" for name in missing]
    problems += [f"{name}: the layout has this parameter, the oracle does not" for name in names - set(expected)]
    return [name for name in expected if name not in missing], _of_all_ranks(problems)


def gather_state(
    pieces: Iterable[Piece], shapes: Shapes, moments: Mapping[str, Sequence[str]]
) -> tuple[State, list[str]]:
    """Master weights and moments on rank 0 (nothing on the others), and what is wrong with the ranks' pieces of them.

    moments: their kinds, by the name of each parameter that has any.
    Every element of every tensor must be in exactly one piece. A sum over ranks of tensors that are zero elsewhere is
    then exact; a second sum counts. Collective.
    """
    held: defaultdict[tuple[str, str], list[Piece]] = defaultdict(list)
    for piece in pieces:
        held[piece.name, piece.kind].append(piece)
    state, problems = State(), list[str]()
    expected = [(name, kind) for name in shapes for kind in ("master", *moments.get(name, ()))]
    for name, kind in expected:
        values, counts = torch.zeros(shapes[name]), torch.zeros(shapes[name], dtype=torch.uint8)
        for piece in held.pop((name, kind), []):
            problem = _add_piece(piece, values, counts)
            problems += [f"{name} ({kind}): {problem}"] if problem else []
        values, counts = _all_reduce(values), _all_reduce(counts)
        if dist.get_rank() == 0:
            state[name, kind] = values
            for wrong, where in ((counts == 0, "in no rank's state"), (counts > 1, "in more than one piece")):
                if n := int(wrong.sum()):
                    problems.append(f"{name} ({kind}): {n} of {counts.numel()} elements are {where}")
    problems += [f"{name} ({kind}): a piece that was not expected" for name, kind in held]
    return state, _of_all_ranks(problems)


def _add_piece(piece: Piece, values: Tensor, counts: Tensor) -> str | None:
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


def _all_reduce(tensor: Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """A CPU tensor reduced over all ranks, through the device that their backend can see."""
    reduced = tensor.to(backend_device())
    dist.all_reduce(reduced, operation)
    return reduced.cpu()


def _of_all_ranks(problems: Sequence[str]) -> list[str]:
    """Every rank's problems, each once and the same on all ranks; the first 4096 bytes of each rank's. Collective."""
    texts = exchange("\n".join(sorted(problems)) or None)
    return list(dict.fromkeys(line for text in texts if text for line in text.split("\n")))
