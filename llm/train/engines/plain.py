"""A short PyTorch engine, one process or data parallel: what the others are compared with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llm.checkpoint.manifest import Piece
from llm.config import RunConfig
from llm.parallel.mesh import Mesh
from llm.slices import slice_of
from llm.train.engines.base import (
    DTYPES,
    MOMENTS,
    MicroBatch,
    StepResult,
    WeightSource,
    clip,
    evaluate_batches,
    global_norm,
    sum_over,
)
from llm.train.optim import DynamicLossScale, adamw, parameter_groups


class PlainEngine:
    """AdamW on fp32 master weights; in bf16 and fp16 the model is a copy of them in the lower precision."""

    def __init__(self, config: RunConfig, model: nn.Module, mesh: Mesh | None, device: torch.device) -> None:
        self.model = model.to(device=device, dtype=DTYPES[config.train.precision])
        self.group = mesh.dp_group if mesh is not None else None
        self.dp_rank = mesh.dp_rank if mesh is not None else 0
        self.grad_clip = config.optim.grad_clip
        self.device = device
        self.parameters = dict(self.model.named_parameters())
        self.masters = {name: self._master(p) for name, p in self.parameters.items()}
        master_of = {id(p): self.masters[name] for name, p in self.parameters.items()}
        groups = parameter_groups(self.model, config.optim.weight_decay)
        for group in groups:
            group["params"] = [master_of[id(p)] for p in group["params"]]
        self.optimizer = adamw(groups, config.optim, config.train.impl)
        self.updates = 0
        self.scale = DynamicLossScale() if config.train.precision == "fp16" else None

    @staticmethod
    def _master(parameter: nn.Parameter) -> Tensor:
        if parameter.dtype == torch.float32:
            return parameter
        return parameter.detach().float().requires_grad_()

    def forward_backward(self, micro_batches: Sequence[MicroBatch], target_count: int) -> float:
        total = torch.zeros(1, dtype=torch.float64)
        for batch in micro_batches:
            loss = self.model(*batch) / target_count
            (loss * (self.scale.scale if self.scale else 1.0)).backward()
            total += loss.detach().double().cpu()
            self._accumulate()
        self._reduce()
        sum_over(total, self.group, self.device)
        return float(total)

    def _accumulate(self) -> None:
        """Add the low-precision gradients of one micro-batch to the fp32 ones of the masters."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is not parameter and parameter.grad is not None:
                grad = parameter.grad.float()
                master.grad = grad if master.grad is None else master.grad.add_(grad)
                parameter.grad = None

    def _reduce(self) -> None:
        masters = list(self.masters.values())
        if self.group is not None and self.group.size() > 1:
            flat = torch.cat([m.grad.flatten() for m in masters if m.grad is not None])
            dist.all_reduce(flat, group=self.group)
            for master, reduced in zip(masters, flat.split([m.numel() for m in masters]), strict=True):
                master.grad = reduced.view_as(master)
        if self.scale:
            torch._foreach_div_([m.grad for m in masters if m.grad is not None], self.scale.scale)

    def step(self) -> StepResult:
        masters = list(self.masters.values())
        norm = global_norm(masters, None)
        finite = bool(norm.isfinite())
        if finite or self.scale is None:
            clip(masters, norm, self.grad_clip)
            self.optimizer.step()
            self.updates += 1
            self._publish()
        if self.scale:
            self.scale = self.scale.update(overflow=not finite)
        self.optimizer.zero_grad()
        return StepResult(float(norm), skipped=self.scale is not None and not finite)

    @torch.no_grad()
    def _publish(self) -> None:
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

    def evaluate(self, micro_batches: Iterable[MicroBatch]) -> tuple[float, int]:
        return evaluate_batches(self.model, micro_batches, self.group)

    def gradient(self, name: str) -> Tensor:
        grad = self.masters[name].grad
        assert grad is not None, f"no gradient of {name}: call forward_backward first"
        return grad

    @property
    def replicated(self) -> bool:
        return True

    def held(self, name: str) -> Tensor:
        return self.parameters[name].detach()

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def state_pieces(self) -> Iterator[Piece]:
        if self.dp_rank != 0:
            return
        for name, parameter in self.parameters.items():
            held, master = slice_of(parameter), self.masters[name]
            yield Piece(name, "master", held, 0, master.detach().flatten().cpu())
            for moment in MOMENTS if self.updates else ():
                yield Piece(name, moment, held, 0, self.optimizer.state[master][moment].flatten().cpu())

    @torch.no_grad()
    def load_pieces(self, source: WeightSource, optimizer_step: int) -> None:
        for name, master in self.masters.items():
            held = slice_of(self.parameters[name])
            master.copy_(source.read_slice(name, "master", held))
            if optimizer_step:
                state = {kind: source.read_slice(name, kind, held).to(self.device) for kind in MOMENTS}
                self.optimizer.state[master] = {
                    "step": torch.tensor(float(optimizer_step), device=self.device),
                    **state,
                }
        self._publish()

    def scalar_state(self) -> dict[str, Any]:
        return {
            "optimizer_step": self.updates,
            "loss_scale": self.scale.state() if self.scale else None,
        }

    def load_scalar_state(self, state: dict[str, Any]) -> None:
        self.updates = state["optimizer_step"]
        if self.scale and state["loss_scale"]:
            self.scale = replace(self.scale, **state["loss_scale"])

    def close(self) -> None:
        """Nothing is held beyond the process group, which its creator ends."""
