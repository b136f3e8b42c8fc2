"""The layout that is verified: its engine, and each of its steps as what the oracle needs to judge it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm.config import RunConfig
from llm.model.gpt import GPT
from llm.model.layers import DenseLayers
from llm.parallel.agreement import exchange
from llm.parallel.mesh import Mesh
from llm.parity.batches import micro_batches, target_count
from llm.parity.gather import Shapes, State, gather_gradients, gather_state, shared_names
from llm.slices import slice_of
from llm.train.build import build_engine
from llm.train.engines.base import MOMENTS, MicroBatch, StepResult
from llm.train.guard import compare_replicas


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
    result: StepResult
    after: State


def global_shapes(config: RunConfig) -> Shapes:
    """The global shape of every parameter, by name."""
    with torch.device("meta"):
        model = GPT(config.model, DenseLayers(seed=config.seed))
    return {name: slice_of(parameter).global_shape for name, parameter in model.named_parameters()}


class Layout:
    """An engine built as a run would build it. Every method is collective."""

    def __init__(self, config: RunConfig, mesh: Mesh, device: torch.device) -> None:
        self.config, self.mesh, self.device = config, mesh, device
        self.shapes = global_shapes(config)
        self.engine = build_engine(config, mesh, device)
        # The schedule is no layout's; at its peak an update is large enough to be seen in a weight.
        self.engine.set_lr(config.optim.lr)
        self.problems: list[str] = []
        """What is wrong beyond numbers, the same on every rank."""
        self.names, missing = shared_names(self.engine.parameters, self.shapes)
        self.note(missing)
        self.updates = 0
        self.state = self._gather()

    def note(self, problems: Sequence[str]) -> None:
        self.problems += [problem for problem in problems if problem not in self.problems]

    def step(self, number: int) -> StepRecord:
        before, scalars = self.state, self.engine.scalar_state()
        loss = self.engine.forward_backward(self._batches(number), target_count(self.config))
        gradients = gather_gradients(self.engine, self.names)
        result = self.engine.step()
        self._agree(number, loss=loss, grad_norm=result.grad_norm, skipped=result.skipped)
        self.note([f"step {number}: {finding}" for finding in compare_replicas(self.engine, self.mesh)])
        self.updates += not result.skipped
        self.state = self._gather()
        return StepRecord(number, before, scalars, loss, gradients, result, self.state)

    def validation_loss(self, number: int) -> float:
        total, count = self.engine.evaluate(self._batches(number))
        return total / count if count else math.nan

    def _batches(self, number: int) -> list[MicroBatch]:
        mesh = self.mesh
        return micro_batches(self.config, number, self.device, dp_rank=mesh.dp_rank, dp_size=mesh.dp_size)

    def _gather(self) -> State:
        kinds = ("master", *MOMENTS) if self.updates else ("master",)
        state, problems = gather_state(self.engine.state_pieces(), self.shapes, kinds)
        self.note(problems)
        return state

    def _agree(self, number: int, **values: float) -> None:
        """Note what the ranks do not report alike."""
        for name, value in values.items():
            found = exchange(repr(value))
            if len(set(found)) > 1:
                self.note([f"step {number}: ranks differ in {name}: {', '.join(map(str, found))}"])
