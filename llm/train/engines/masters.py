"""fp32 master weights, AdamW and fp16's loss scale, for the plain and the FSDP engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from llm.checkpoint.manifest import Piece
from llm.config import RunConfig
from llm.parallel.mesh import Mesh
from llm.slices import slice_of
from llm.train.engines.base import MicroBatch, StepResult, WeightSource, sum_over
from llm.train.engines.shared import DynamicLossScale, clip
from llm.train.engines.state import Fragment, load_state, state_pieces
from llm.train.optim import adamw, parameter_groups


class MasterWeightsEngine:
    """AdamW on fp32 masters; a subclass adds how gradients are reduced, their norm, and which shards it holds."""

    replicated: bool
    """Whether every data-parallel rank holds the same masters, rather than a shard of each."""

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        masters: Mapping[str, Tensor],
        mesh: Mesh | None,
        device: torch.device,
    ) -> None:
        """masters: fp32, by parameter; the parameters themselves, shards of them, or copies. mesh: None if alone."""
        self.model = model
        self.masters = masters
        self.device = device
        self.dp_group = mesh.dp_group if mesh is not None else None
        self.dp_rank, self.tp_rank = (mesh.dp_rank, mesh.tp_rank) if mesh is not None else (0, 0)
        self.grad_clip = config.optim.grad_clip
        self.parameters: dict[str, Any] = dict(model.named_parameters())
        self.slices = {name: slice_of(parameter) for name, parameter in self.parameters.items()}
        master_of = {id(parameter): masters[name] for name, parameter in self.parameters.items()}
        groups = parameter_groups(model, config.optim.weight_decay)
        for group in groups:
            group["params"] = [master_of[id(parameter)] for parameter in group["params"]]
        self.optimizer = adamw(groups, config.optim, config.train.impl)
        self.updates = 0
        self.scale = DynamicLossScale() if config.train.precision == "fp16" else None

    def _fragments(self) -> dict[str, Fragment]:
        """Which part of its parameter's slice each master is."""
        raise NotImplementedError

    def _reduce(self) -> None:
        """Give the masters the gradients of the micro-batches, summed over the data-parallel ranks."""
        raise NotImplementedError

    def _norm(self) -> Tensor:
        """2-norm of the model's gradient, fp32 []."""
        raise NotImplementedError

    def _accumulate(self) -> None:
        """Take over the gradient of one micro-batch."""

    def _publish(self) -> None:
        """Copy changed masters to the weights that the forward pass uses."""

    def forward_backward(self, micro_batches: Sequence[MicroBatch], target_count: int) -> float:
        total = torch.zeros(1, dtype=torch.float64)
        for batch in micro_batches:
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

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def state_pieces(self) -> Iterator[Piece]:
        if self.replicated and self.dp_rank != 0:
            return iter(())
        moments = self.updates > 0
        return state_pieces(self._fragments(), self.slices, self.optimizer, tp_rank=self.tp_rank, moments=moments)

    def load_pieces(self, source: WeightSource, optimizer_step: int) -> None:
        load_state(self._fragments(), self.slices, self.optimizer, source, optimizer_step)
        self._publish()

    def scalar_state(self) -> dict[str, Any]:
        return {"optimizer_step": self.updates, "loss_scale": self.scale.state() if self.scale else None}

    def load_scalar_state(self, state: dict[str, Any]) -> None:
        self.updates = state["optimizer_step"]
        if self.scale and state["loss_scale"]:
            self.scale = replace(self.scale, **state["loss_scale"])

    def close(self) -> None:
        """Nothing is held beyond the process group, which its creator ends."""
