"""fp32 master weights, AdamW and fp16's loss scale, for the plain and the FSDP engine."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llm.config import RunConfig
from llm.model.gpt import GPT
from llm.parallel.mesh import Mesh
from llm.train.engines.base import Engine, MicroBatch, StepResult, sum_over
from llm.train.engines.shared import DynamicLossScale, clip, evaluate_batches
from llm.train.optim import adamw, parameter_groups


class MasterWeightsEngine(Engine):
    """AdamW on fp32 masters; a subclass adds how gradients are reduced, their norm, and which shards it holds."""

    def __init__(
        self, config: RunConfig, model: GPT, masters: Mapping[str, Tensor], mesh: Mesh | None, device: torch.device
    ) -> None:
        """masters: fp32, by parameter; the parameters themselves, shards of them, or copies."""
        super().__init__(config, model, mesh, device)
        self.masters, self.replicated_state = masters, self.replicated
        master_of = {id(parameter): masters[name] for name, parameter in self.parameters.items()}
        groups = parameter_groups(model, config.optim.weight_decay)
        for group in groups:
            group["params"] = [master_of[id(parameter)] for parameter in group["params"]]
        self.optimizer = adamw(groups, config.optim, model.forms.adamw)
        self.scale = DynamicLossScale() if config.train.precision == "fp16" else None

    @abstractmethod
    def _reduce(self) -> None:
        """Give the masters the gradients of the micro-batches, summed over the data-parallel ranks."""

    @abstractmethod
    def _norm(self) -> Tensor:
        """2-norm of the model's gradient, fp32 []."""

    def _accumulate(self) -> None:
        """Take over the gradient of one micro-batch."""

    def forward_backward(self, micro_batches: Sequence[MicroBatch], target_count: int) -> float:
        total = torch.zeros(1, dtype=torch.float64)
        for batch in micro_batches:
            with self.forward_time:
                loss = self.model(*batch) / target_count
            (loss * (self.scale.scale if self.scale else 1.0)).backward()
            total += loss.detach().double().cpu()
            self._accumulate()
        self._reduce()
        if self.scale:
            grads = [master.grad for master in self.masters.values() if master.grad is not None]
            torch._foreach_div_(grads, self.scale.scale)
        sum_over(total, self.dp_group, self.device)
        return float(total)

    def step(self) -> StepResult:
        masters = list(self.masters.values())
        norm = self._norm()
        finite = bool(norm.isfinite())
        if finite or self.scale is None:
            clip(masters, norm.to(masters[0].device), self.grad_clip)
            self.optimizer.step()
            self.updates += 1
            self._publish()
        if self.scale:
            self.scale = self.scale.update(overflow=not finite)
        self.optimizer.zero_grad()
        self.model.zero_grad()
        return StepResult(float(norm), skipped=self.scale is not None and not finite)

    def evaluate(self, micro_batches: Iterable[MicroBatch]) -> tuple[float, int]:
        return evaluate_batches(self.model, micro_batches, self.dp_group)

    def scalar_state(self) -> dict[str, Any]:
        return {"optimizer_step": self.updates, "loss_scale": self.scale.state() if self.scale else None}

    def load_scalar_state(self, state: dict[str, Any]) -> None:
        self.updates = state["optimizer_step"]
        if self.scale and state["loss_scale"]:
            self.scale = replace(self.scale, **state["loss_scale"])
