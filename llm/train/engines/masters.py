"""fp32 master weights, AdamW and fp16's loss scale: what the plain and the FSDP engine have in common."""

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
from llm.train.engines.base import MOMENTS, MicroBatch, StepResult, WeightSource, sum_over
from llm.train.engines.shared import clip
from llm.train.optim import DynamicLossScale, adamw, parameter_groups


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

    def shard(self, name: str) -> tuple[int, int]:
        """Start and length of the master in the flattened slice of its parameter, without a vocabulary's padding."""
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
        for name, master in self.masters.items():
            part, (start, numel) = self.slices[name], self.shard(name)
            written_elsewhere = (self.replicated and self.dp_rank != 0) or (part.is_whole and self.tp_rank != 0)
            if written_elsewhere or numel == 0:
                continue
            tensors = {"master": master.detach()}
            if self.updates:
                tensors |= {kind: self.optimizer.state[master][kind] for kind in MOMENTS}
            for kind, tensor in tensors.items():
                yield Piece(name, kind, part, start, tensor.flatten()[:numel].cpu())

    @torch.no_grad()
    def load_pieces(self, source: WeightSource, optimizer_step: int) -> None:
        for name, master in self.masters.items():
            tensors = {"master": master}
            if optimizer_step:
                moments = {kind: torch.zeros_like(master, requires_grad=False) for kind in MOMENTS}
                step = torch.tensor(float(optimizer_step), device=master.device)
                self.optimizer.state[master] = {"step": step, **moments}
                tensors |= moments
            start, numel = self.shard(name)
            for kind, tensor in tensors.items() if numel else ():
                values = source.read_slice(name, kind, self.slices[name]).flatten()
                tensor.flatten()[:numel].copy_(values.narrow(0, start, numel))
        self._publish()

    def scalar_state(self) -> dict[str, Any]:
        return {"optimizer_step": self.updates, "loss_scale": self.scale.state() if self.scale else None}

    def load_scalar_state(self, state: dict[str, Any]) -> None:
        self.updates = state["optimizer_step"]
        if self.scale and state["loss_scale"]:
            self.scale = replace(self.scale, **state["loss_scale"])

    def close(self) -> None:
        """Nothing is held beyond the process group, which its creator ends."""
