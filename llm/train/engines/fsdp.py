"""The FSDP2 engine: parameters, gradients and moments cut by rows over the data-parallel group (Zhao et al. 2023).

A unit, which is a block of the model or the rest of it (tables, last norm, head), is gathered when the forward or the
backward pass comes to it, and its gradient is reduced to shards when the backward pass leaves it. A parameter of R
rows, which may be a tensor-parallel slice, has rows [r n, (r + 1) n), n = ceil(R / dp), on data-parallel rank r.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from llm.checkpoint.manifest import Piece
from llm.config import RunConfig
from llm.errors import require
from llm.model.gpt import GPT
from llm.parallel.mesh import Mesh
from llm.slices import mark, slice_of
from llm.train.engines.base import (
    DTYPES,
    MOMENTS,
    MicroBatch,
    StepResult,
    WeightSource,
    clip,
    evaluate_batches,
    gather_slices,
    sum_of_squares,
    sum_over,
)
from llm.train.optim import DynamicLossScale, adamw, parameter_groups


class FSDPEngine:
    """AdamW on fp32 shards; in bf16 and fp16 what is gathered is a copy of them in the lower precision."""

    def __init__(self, config: RunConfig, model: GPT, mesh: Mesh, device: torch.device) -> None:
        """`model` is on the meta device: units are given memory one by one, right before they are cut."""
        require(
            config.parallel.offload == "none" or device.type != "cpu",
            f"parallel.offload {config.parallel.offload} moves shards from a GPU to the CPU's memory; this run is on a "
            "CPU, where they are already: use parallel.offload=none",
        )
        self.model = model
        self.mesh = mesh
        self.device = device
        self.grad_clip = config.optim.grad_clip
        self.slices = {name: slice_of(p) for name, p in model.named_parameters()}
        self.split = {name: getattr(p, "tensor_model_parallel", False) for name, p in model.named_parameters()}
        self.units = shard(model, config, mesh, device)
        self.parameters: dict[str, Any] = dict(model.named_parameters())
        for name, parameter in self.parameters.items():
            mark(parameter, self.slices[name])
            parameter.tensor_model_parallel = self.split[name]
        # Plain tensors in the shards' memory: AdamW over DTensors would pay their dispatch for every parameter.
        self.masters = {name: p.to_local().detach().requires_grad_() for name, p in self.parameters.items()}
        master_of = {id(p): self.masters[name] for name, p in self.parameters.items()}
        groups = parameter_groups(model, config.optim.weight_decay)
        for group in groups:
            group["params"] = [master_of[id(p)] for p in group["params"]]
        self.optimizer = adamw(groups, config.optim, config.train.impl)
        self.updates = 0
        self.scale = DynamicLossScale() if config.train.precision == "fp16" else None

    def forward_backward(self, micro_batches: Sequence[MicroBatch], target_count: int) -> float:
        total = torch.zeros(1, dtype=torch.float64)
        for batch in micro_batches:
            loss = self.model(*batch) / target_count
            # Every backward pass reduces, and the sums over micro-batches are of fp32 shards. Reducing after the last
            # one only would save (m - 1) / m of the reductions, of which there are as many as of gathers, and keep
            # whole fp32 gradients on every rank in between: that memory is what these stages are for.
            (loss * (self.scale.scale if self.scale else 1.0)).backward()
            total += loss.detach().double().cpu()
        for name, master in self.masters.items():
            local = self.parameters[name].to_local()
            assert local.data_ptr() == master.data_ptr(), f"FSDP moved the shard of {name}: AdamW would not reach it"
            master.grad = self._reduced(name).to_local()
        if self.scale:
            torch._foreach_div_([m.grad for m in self.masters.values()], self.scale.scale)
        sum_over(total, self.mesh.dp_group, self.device)
        return float(total)

    def _reduced(self, name: str) -> DTensor:
        grad = self.parameters[name].grad
        assert grad is not None, f"no gradient of {name}: call forward_backward first"
        return grad

    def step(self) -> StepResult:
        masters = list(self.masters.values())
        norm = self._norm()
        finite = bool(norm.isfinite())
        if finite or self.scale is None:
            clip(masters, norm.to(masters[0].device), self.grad_clip)
            self.optimizer.step()
            self.updates += 1
        if self.scale:
            self.scale = self.scale.update(overflow=not finite)
        self.optimizer.zero_grad()
        self.model.zero_grad()
        return StepResult(float(norm), skipped=self.scale is not None and not finite)

    def _norm(self) -> Tensor:
        """2-norm of the whole gradient, fp32 [] on the CPU: a shard counts once, a tensor-parallel replica once."""
        squares = torch.zeros(2)
        for i, split in enumerate((True, False)):
            grads = [m.grad for name, m in self.masters.items() if self.split[name] == split and m.grad is not None]
            squares[i] = sum_of_squares(grads)
        sum_over(squares, self.mesh.dp_group, self.device)
        sum_over(squares[:1], self.mesh.tp_group, self.device)
        return squares.sum().sqrt()

    def evaluate(self, micro_batches: Iterable[MicroBatch]) -> tuple[float, int]:
        result = evaluate_batches(self.model, micro_batches, self.mesh.dp_group)
        for unit in self.units:  # no backward pass followed, which would have done it
            unit.reshard()
        return result

    def gradient(self, name: str) -> Tensor:
        # To the device, where the group can gather shards that are offloaded.
        shards: Any = self._reduced(name).to(self.device)
        return gather_slices(shards.full_tensor(), self.slices[name], self.mesh)

    @property
    def replicated(self) -> bool:
        return False

    def held(self, name: str) -> Tensor:
        return self.masters[name].detach()

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def _range(self, name: str) -> tuple[int, int]:
        """Start and length of this rank's flat range of the slice, without a vocabulary's padding rows (last)."""
        rows, *rest = self.parameters[name].shape
        start = self.mesh.dp_rank * -(-rows // self.mesh.dp_size) * torch.Size(rest).numel()
        return start, max(0, min(self.masters[name].numel(), self.slices[name].numel - start))

    def state_pieces(self) -> Iterator[Piece]:
        for name, master in self.masters.items():
            held, (start, numel) = self.slices[name], self._range(name)
            if numel == 0 or (held.is_whole and self.mesh.tp_rank != 0):
                continue
            kinds = {"master": master.detach()}
            if self.updates:
                kinds |= {kind: self.optimizer.state[master][kind] for kind in MOMENTS}
            for kind, tensor in kinds.items():
                yield Piece(name, kind, held, start, tensor.flatten()[:numel].cpu())

    @torch.no_grad()
    def load_pieces(self, source: WeightSource, optimizer_step: int) -> None:
        for name, master in self.masters.items():
            targets = {"master": master}
            if optimizer_step:
                moments = {kind: torch.zeros_like(master, requires_grad=False) for kind in MOMENTS}
                step = torch.tensor(float(optimizer_step), device=master.device)
                self.optimizer.state[master] = {"step": step, **moments}
                targets |= moments
            start, numel = self._range(name)
            for kind, target in targets.items() if numel else ():
                local = source.read_slice(name, kind, self.slices[name]).flatten()
                target.flatten()[:numel].copy_(local.narrow(0, start, numel))

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


def shard(model: GPT, config: RunConfig, mesh: Mesh, device: torch.device) -> list[FSDPModule]:
    """Cut a model on the meta device into shards of zeros on `device`, each block a unit, then the rest; the units."""
    low = None if config.train.precision == "fp32" else DTYPES[config.train.precision]
    # Floating-point activations have the parameters' precision from the embedding on: none is an input to cast.
    precision = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy() if config.parallel.offload == "all" else OffloadPolicy()
    keeps = config.parallel.zero_stage == 2
    # The rest stays gathered at either stage: the backward pass begins where the forward pass ends, with the head.
    wanted = [(block, not keeps) for block in model.blocks.values()] + [(model, False)]
    units = []
    for module, reshard in wanted:
        materialise(module, device)
        unit = fully_shard(
            module, mesh=mesh.devices["dp"], reshard_after_forward=reshard, mp_policy=precision, offload_policy=offload
        )
        # The sum over ranks, not their mean: the loss is divided by the global count of targets.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
        units.append(unit)
    return units


def materialise(module: nn.Module, device: torch.device) -> None:
    """Give the parameters of `module` that are on the meta device memory on `device`, filled with zeros."""
    for parameter in module.parameters():
        if parameter.is_meta:
            torch.utils.swap_tensors(parameter, nn.Parameter(torch.zeros_like(parameter, device=device)))
