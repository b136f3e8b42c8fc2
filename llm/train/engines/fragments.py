"""Where DeepSpeed keeps this rank's part of a parameter's fp32 state, at each ZeRO stage.

Whatever the stage, the fp32 weights that the optimizer updates are a range of some tensor `flat` that is a key of the
optimizer's state, and that range is a flat range of the (tensor-parallel slice of the) parameter. Checkpoints read
and write those ranges; nothing else depends on the stage.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Fragment(NamedTuple):
    """`numel` elements from `offset` of `flat` are those from `start` of the flattened local parameter."""

    flat: Tensor
    offset: int
    start: int
    numel: int

    @property
    def master(self) -> Tensor:
        return self.flat.detach().view(-1).narrow(0, self.offset, self.numel)

    def moment(self, optimizer: torch.optim.Optimizer, name: str) -> Tensor:
        return optimizer.state[self.flat][name].view(-1).narrow(0, self.offset, self.numel)


def fragment(zero_stage: int, optimizer: Any, parameter: Any, dp_rank: int) -> Fragment | None:
    """This rank's fragment of `parameter`, or None where it holds nothing of it. `optimizer`: engine.optimizer."""
    if zero_stage == 0:
        return Fragment(parameter, 0, 0, parameter.numel())
    if zero_stage == 3:
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = dp_rank * size
        numel = min(size, parameter.ds_numel - start)
        return Fragment(optimizer.fp32_partitioned_groups_flat[group], offset, start, numel) if numel > 0 else None
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    flats = getattr(optimizer, "fp32_groups_flat_partition", None)  # BF16_Optimizer; else stages 1 and 2
    flats = flats if flats is not None else optimizer.single_partition_of_fp32_groups
    lp, hp = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Fragment(flats[mapping.param_group_index], hp.start, lp.start, hp.numel)


def publish(zero_stage: int, optimizer: Any) -> None:
    """Copy changed fp32 fragments to the weights that the forward pass uses. Collective."""
    if zero_stage in (1, 2):
        optimizer.update_lp_params()
    elif zero_stage == 3:
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        persistent = optimizer.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)
