"""fp32 master weights, AdamW and fp16's loss scale, for the plain and the FSDP engine."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llm.config import RunConfig
from llm.model.build import Model
from llm.parallel.collectives import UNTIMED
from llm.parallel.mesh import Mesh
from llm.train.engines.base import Engine, Measure, MicroBatch, Refuse, StepResult, not_finite, sum_over
from llm.train.engines.shared import DynamicLossScale, clip, measure_batches
from llm.train.muon import optimizer_of
from llm.train.optim import parameter_groups, skip_where


class MasterWeightsEngine(Engine):
    """AdamW on fp32 masters; a subclass adds how gradients are reduced, their norm, and which shards it holds."""

    def __init__(
        self, config: RunConfig, model: Model, masters: Mapping[str, Tensor], mesh: Mesh | None, device: torch.device
    ) -> None:
        """masters: fp32, by parameter; the parameters themselves, shards of them, or copies."""
        super().__init__(config, model, mesh, device)
        self.masters, self.replicated_state = masters, self.replicated
        master_of = {id(parameter): masters[name] for name, parameter in self.parameters.items()}
        groups = parameter_groups(model, config.optim.weight_decay)
        for group in groups:
            group["params"] = [master_of[id(parameter)] for parameter in group["params"]]
        self.optimizer = optimizer_of(config, model, groups, masters, self._fragments, mesh)
        self.scale = DynamicLossScale() if config.train.precision == "fp16" else None

    @abstractmethod
    def _reduce(self) -> None:
        """Give the masters the gradients of the micro-batches, summed over the data-parallel ranks."""

    @abstractmethod
    def _norm(self) -> Tensor:
        """2-norm of the model's gradient, fp32 []."""

    def _accumulate(self) -> None:
        """Take over the gradient of one micro-batch."""

    @property
    def updates(self) -> int:
        state = next(iter(self.optimizer.state.values()), None)
        return 0 if state is None else int(state["step"])

    def forward_backward(self, micro_batches: Sequence[MicroBatch], target_count: int | Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        scale = self.scale.scale if self.scale else 1.0
        for batch in micro_batches:
            with self.forward_time:
                loss = self.model(*batch) / target_count
            (loss * scale).backward()
            total += loss.detach()
            self._accumulate()
        self._reduce()
        if self.scale:
            grads = [master.grad for master in self.masters.values() if master.grad is not None]
            torch._foreach_div_(grads, scale.to(grads[0]) if isinstance(scale, Tensor) else scale)
        with self.waits.get("dp", UNTIMED):
            return sum_over(total, self.dp_group)

    def step(self, refuse: Refuse = not_finite) -> StepResult:
        """As Engine.step. Whether to update is decided on the device, so that nothing waits for it."""
        masters = list(self.masters.values())
        norm = self._norm().to(masters[0].device)  # which is the CPU where they are offloaded
        left_out = refuse(norm).to(norm.device)
        clip(masters, norm, self.grad_clip)
        skip_where(left_out, self.optimizer)
        self.optimizer.step()
        self._publish()
        skipped = torch.zeros_like(left_out)
        if self.scale:
            self.scale, skipped = self.scale.update(not_finite(norm))
        self.optimizer.zero_grad()
        self.model.zero_grad()
        return StepResult(norm, skipped, left_out & skipped.logical_not())

    def measure(self, micro_batches: Iterable[MicroBatch], of: Measure, numbers: int) -> list[float]:
        return measure_batches(self.model, micro_batches, of, numbers, self.dp_group, self.device)

    def scalar_state(self) -> dict[str, Any]:
        return {"optimizer_step": self.updates, "loss_scale": self.scale.state() if self.scale else None}

    def load_scalar_state(self, state: dict[str, Any]) -> None:
        """The number of updates comes with the moments (Engine.load_pieces)."""
        if self.scale and state["loss_scale"]:
            self.scale = replace(self.scale, **state["loss_scale"])
