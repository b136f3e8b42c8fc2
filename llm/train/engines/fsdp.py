"""The FSDP2 engine: parameters, gradients and moments sharded by rows over the data-parallel group (Zhao et al. 2023).

A unit is a block of the model, or the rest of it (tables, last norm, head). It is gathered when the forward or the
backward pass reaches it, and its gradient is reduced to shards when the backward pass leaves it. A parameter of R
rows, which may be a tensor-parallel slice, has rows [r n, (r + 1) n), n = ceil(R / dp), on data-parallel rank r.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from llm.config import RunConfig
from llm.errors import require
from llm.model.build import Model
from llm.model.init import give_memory
from llm.parallel.mesh import Mesh
from llm.slices import mark, slice_of
from llm.train.engines.base import DTYPES, Fragment, Measure, MicroBatch, sum_over
from llm.train.engines.masters import MasterWeightsEngine
from llm.train.engines.shared import gather_slices, sum_of_squares


class FSDPEngine(MasterWeightsEngine):
    """AdamW on fp32 shards; in bf16 and fp16 what is gathered is a copy of them in the lower precision.

    Every backward pass reduces, and the sums over micro-batches are of fp32 shards. Reducing after the last one only
    would save (m - 1) / m of the reductions, of which there are as many as of gathers, and keep whole fp32 gradients on
    every rank in between: that memory is what these stages are for.
    """

    replicated = False

    def __init__(self, config: RunConfig, model: Model, mesh: Mesh, device: torch.device) -> None:
        """`model` is on the meta device: units are given memory one by one, right before they are cut."""
        require(
            config.parallel.offload == "none" or device.type != "cpu",
            f"parallel.offload {config.parallel.offload} moves shards from a GPU to the CPU's memory; this run is on a "
            "CPU, where they are already: use parallel.offload=none",
        )
        self.mesh = mesh
        slices = {name: slice_of(p) for name, p in model.named_parameters()}
        self.split = {name: getattr(p, "tensor_model_parallel", False) for name, p in model.named_parameters()}
        self.units = shard(model, config, mesh, device)
        # Plain tensors in the shards' memory: AdamW over DTensors would pay their dispatch for every parameter.
        parameters: dict[str, Any] = dict(model.named_parameters())
        masters = {
            name: parameter.to_local().detach().requires_grad_(parameter.requires_grad)
            for name, parameter in parameters.items()
        }
        for name, parameter in parameters.items():
            mark(parameter, slices[name])
            parameter.tensor_model_parallel = self.split[name]
        super().__init__(config, model, masters, mesh, device)

    def _fragments(self) -> dict[str, Fragment]:
        found = {}
        for name, master in self.masters.items():
            rows, *rest = self.parameters[name].shape
            start = self.mesh.dp_rank * -(-rows // self.mesh.dp_size) * torch.Size(rest).numel()
            numel = max(0, min(master.numel(), self.slices[name].numel - start))
            found[name] = Fragment(master, 0, start, numel)
        return found

    @torch.no_grad()  # which spares each parameter an autograd function
    def _reduce(self) -> None:
        """The backward passes have reduced: the masters take the gradients' shards."""
        for name in self.trained:
            master = self.masters[name]
            local = self.parameters[name].to_local()
            assert local.data_ptr() == master.data_ptr(), f"FSDP moved the shard of {name}: AdamW would not reach it"
            master.grad = self._sharded_gradient(name).to_local()

    def _sharded_gradient(self, name: str) -> DTensor:
        grad = self.parameters[name].grad
        assert grad is not None, f"no gradient of {name}: call forward_backward first"
        return grad

    def _norm(self) -> Tensor:
        """A shard counts once, a tensor-parallel replica once."""
        grads = {True: [], False: []}
        for name, master in self.masters.items():
            if master.grad is not None:
                grads[self.split[name]].append(master.grad)
        device = next(iter(self.masters.values())).device
        squares = torch.stack([sum_of_squares(grads[split], device) for split in (True, False)]).to(self.device)
        sum_over(squares, self.mesh.dp_group)
        sum_over(squares.narrow(0, 0, 1), self.mesh.tp_group)
        return squares.sum().sqrt()

    def _publish(self) -> None:
        """FSDP casts the masters' memory whenever it gathers it."""

    def measure(self, micro_batches: Iterable[MicroBatch], of: Measure, numbers: int) -> list[float]:
        result = super().measure(micro_batches, of, numbers)
        for unit in self.units:  # no backward pass followed, which would have done it
            unit.reshard()
        return result

    def gradient(self, name: str) -> Tensor:
        # To the device, where the group can gather shards that are offloaded.
        shards: Any = self._sharded_gradient(name).to(self.device)
        return gather_slices(shards.full_tensor(), self.slices[name], self.mesh)

    def local_weight(self, name: str) -> Tensor:
        return self.masters[name].detach()


def shard(model: Model, config: RunConfig, mesh: Mesh, device: torch.device) -> list[FSDPModule]:
    """Cut a model on the meta device into shards of zeros on `device`, each block a unit, then the rest; the units."""
    low = None if config.train.precision == "fp32" else DTYPES[config.train.precision]
    # Floating-point activations have the parameters' precision from the embedding on: none is an input to cast.
    precision = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy() if config.parallel.offload == "all" else OffloadPolicy()
    # The rest stays gathered at either stage: the backward pass begins where the forward pass ends, with the head.
    modules = [(block, config.parallel.zero_stage != 2) for block in model.blocks.values()] + [(model, False)]
    units = []
    for module, reshard in modules:
        for parameter in module.parameters():
            if parameter.is_meta:  # of the model, what is in no block
                give_memory(parameter, device)
        unit = fully_shard(
            module, mesh=mesh.devices["dp"], reshard_after_forward=reshard, mp_policy=precision, offload_policy=offload
        )
        # The sum over ranks, not their mean: the loss is divided by the global count of targets.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
        units.append(unit)
    return units
