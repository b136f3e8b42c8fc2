"""The DeepSpeed engine: ZeRO 0-3 over the data-parallel group. The only file that imports deepspeed."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils import cpp_extension

from llm.config import RunConfig
from llm.errors import InputError
from llm.model.build import Model
from llm.model.init import give_memory
from llm.parallel.mesh import Mesh
from llm.train.engines.base import (
    DTYPES,
    Engine,
    Fragment,
    Measure,
    MicroBatch,
    Refuse,
    StepResult,
    not_finite,
    sum_over,
)
from llm.train.engines.deepspeed_config import deepspeed_config
from llm.train.engines.shared import DynamicLossScale, clip, gather_slices, global_norm, measure_batches
from llm.train.engines.zero_state import fragments, frozen_parts, publish
from llm.train.muon import optimizer_of
from llm.train.optim import parameter_groups, skip_where


class DeepSpeedEngine(Engine):
    """AdamW under ZeRO, with gradients, norms and checkpoints in terms of global tensors."""

    def __init__(self, config: RunConfig, model: Model, mesh: Mesh, device: torch.device) -> None:
        super().__init__(config, model, mesh, device)
        self.mesh = mesh
        self.stage, self.offloaded = config.parallel.zero_stage, config.parallel.offload != "none"
        self.replicated, self.replicated_state = self.stage < 3, self.stage == 0
        self.applied, self.fp16 = torch.zeros((), dtype=torch.int64, device=device), config.train.precision == "fp16"
        self.shapes = {name: p.shape for name, p in self.parameters.items()}  # before ZeRO 3 partitions them
        generated = deepspeed_config(config, dp_size=mesh.dp_size, device=device.type)
        # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 has renamed; each would warn once per call site.
        warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated", category=FutureWarning)
        # torch quotes every path in the build of DeepSpeed's operator but this one, which a space would cut in two.
        cpp_extension.TORCH_LIB_PATH = shlex.quote(f"{cpp_extension._TORCH_PATH}/lib")
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        if self.stage == 3:
            partition(model, generated, mesh, device, DTYPES[config.train.precision])
        # ZeRO will replace its parameters by flat fp32 tensors.
        groups = parameter_groups(model, config.optim.weight_decay)
        self.optimizer = optimizer_of(config, model, groups, self.parameters, self._fragments, mesh)
        # ZeRO computes the norm within its step, and then calls the optimizer: here alone both can be had.
        self.optimizer.register_step_pre_hook(self._before_update)
        self.engine: deepspeed.DeepSpeedEngine
        self.zero: Any
        try:
            self.engine, self.zero, _, _ = deepspeed.initialize(
                model=model, optimizer=self.optimizer, config=generated, mpu=groups_of(mesh), dist_init_required=False
            )
        except ValidationError as error:  # a key of the `deepspeed` section is the user's to mend
            raise InputError(f"DeepSpeed refuses its part of the config (deepspeed.*): {error}") from error
        self.frozen = frozen_parts(self.stage, self.parameters, mesh.dp_size)

    @property
    def updates(self) -> int:
        return int(self.applied)

    def forward_backward(self, micro_batches: Sequence[MicroBatch], target_count: int | Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        # DeepSpeed averages gradients over data-parallel ranks; the loss is a sum over them.
        scale = self.mesh.dp_size / (target_count.double() if isinstance(target_count, Tensor) else target_count)
        for i, batch in enumerate(micro_batches):
            # DeepSpeed counts to the number of its config, which is the first phase's.
            self.engine.set_gradient_accumulation_boundary(i + 1 == len(micro_batches))
            with self.forward_time:
                loss = self.engine(*batch)
            self.engine.backward(loss * scale, scale_wrt_gas=False)
            total += loss.detach()
            if i + 1 < len(micro_batches):
                self.engine.step()  # not at the accumulation boundary: only counts
        return sum_over(total, self.dp_group) / target_count

    def step(self, refuse: Refuse = not_finite) -> StepResult:
        """As Engine.step. DeepSpeed reads some numbers of its own in it, for which it waits (docs/parallelism.md)."""
        self.refuse, self.left_out = refuse, None
        if self.stage == 0:
            # DeepSpeed does not report the norm here, so Ingot computes it once and clips by it.
            parameters = list(self.parameters.values())
            norm = global_norm(parameters, self.mesh)
            clip(parameters, norm, self.grad_clip)
            self._judge(norm)
            self.engine.step()
        else:
            self.engine.step()
            norm = self.engine.get_global_grad_norm()
        # ZeRO leaves out by itself a step whose gradients are not finite, which only fp16 can mend by its loss scale.
        skipped = self.fp16 and not self.engine.was_step_applied()
        left_out = self._judge(norm) & (not skipped)
        self.applied += left_out.logical_not() & (not skipped)
        return StepResult(self._on_device(norm), torch.full((), skipped, device=self.device), left_out)

    def _before_update(self, *_: Any) -> None:
        """Called by the optimizer, under ZeRO 3 for each of its groups."""
        if self.left_out is None:
            self._judge(self.zero._global_grad_norm)

    def _judge(self, norm: Tensor | float | None) -> Tensor:
        """Whether this step is refused, which the optimizer then hears: asked once a step. Collective."""
        if self.left_out is None:
            self.left_out = self.refuse(self._on_device(norm)).to(self.device)
            skip_where(self.left_out.to("cpu" if self.offloaded else self.device), self.optimizer)
        return self.left_out

    def _on_device(self, norm: Tensor | float | None) -> Tensor:
        """A norm as DeepSpeed has it, [] on the device: None and -1 stand for one that is not finite."""
        found = torch.as_tensor(-1.0 if norm is None else norm, device=self.device)
        return torch.where(found >= 0, found, torch.nan)

    def measure(self, micro_batches: Iterable[MicroBatch], of: Measure, numbers: int) -> list[float]:
        return measure_batches(self.engine, micro_batches, of, numbers, self.dp_group, self.device)

    def gradient(self, name: str) -> Tensor:
        parameter = self.parameters[name]
        local = parameter.grad if self.stage == 0 else safe_get_full_grad(parameter)
        assert local is not None, f"no gradient of {name}: call forward_backward first"
        return gather_slices(local.float().view(self.shapes[name]), self.slices[name], self.mesh)

    def local_weight(self, name: str) -> Tensor:
        parameter: Any = self.parameters[name]
        if self.replicated:
            return parameter.detach()
        part = parameter.ds_tensor  # the last ranks' end in padding that DeepSpeed leaves as it found it
        return part.detach()[: max(0, parameter.ds_numel - self.dp_rank * part.numel())]

    def _fragments(self) -> dict[str, Fragment]:
        return fragments(self.stage, self.zero, self.parameters, self.frozen, self.dp_rank)

    def _publish(self) -> None:
        publish(self.stage, self.zero, self.parameters, self.frozen, self.mesh.dp_group)

    def scalar_state(self) -> dict[str, Any]:
        scale = None
        if self.fp16:
            scaler = self.zero.loss_scaler
            good_steps = scaler.cur_iter - scaler.last_overflow_iter - 1
            scale = DynamicLossScale(scaler.cur_scale, remaining=scaler.cur_hysteresis, good_steps=good_steps).state()
        return {"optimizer_step": self.updates, "loss_scale": scale}

    def load_scalar_state(self, state: dict[str, Any]) -> None:
        self.applied.fill_(state["optimizer_step"])
        if self.fp16 and state["loss_scale"]:
            scaler, saved = self.zero.loss_scaler, state["loss_scale"]
            scaler.cur_scale, scaler.cur_hysteresis = saved["scale"], saved["remaining"]
            scaler.cur_iter, scaler.last_overflow_iter = saved["good_steps"], -1

    def close(self) -> None:
        self.engine.destroy()


def groups_of(mesh: Mesh) -> SimpleNamespace:
    """The mesh as the `mpu` object that DeepSpeed asks for ranks, sizes and groups."""
    axes = {"model": "tp", "tensor_model": "tp", "data": "dp"}
    asked = {"rank": "rank", "world_size": "size", "group": "group"}
    return SimpleNamespace(
        **{
            f"get_{name}_parallel_{what}": partial(getattr, mesh, f"{axis}_{ours}")
            for name, axis in axes.items()
            for what, ours in asked.items()
        }
    )


@torch.no_grad()
def partition(
    model: nn.Module, generated: dict[str, Any], mesh: Mesh, device: torch.device, dtype: torch.dtype
) -> None:
    """Give a model on the "meta" device its memory, filled with zeros, of which every data-parallel rank keeps a part.

    One parameter is whole at a time.
    DeepSpeed's own group would be the world, which would spread one tensor-parallel rank's slice over its peers.
    `generated`: the DeepSpeed config. Collective.
    """
    for parameter in model.parameters():
        give_memory(parameter, device, dtype)
        deepspeed.zero.Init(
            nn.ParameterList([parameter]),
            data_parallel_group=mesh.dp_group,
            config_dict_or_path=generated,
            mpu=groups_of(mesh),
        )
