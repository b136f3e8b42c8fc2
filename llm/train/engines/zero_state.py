"""Finds where DeepSpeed keeps this rank's part of a parameter's fp32 state, at each ZeRO stage.

At every stage the fp32 weights that the optimizer updates are a range of some tensor that is a key of the optimizer's
state. That range is a flat range of the parameter, or of its tensor-parallel slice.

Of weights that are not trained DeepSpeed has no fp32 state: above stage 0 it keeps them in train.precision alone. Their
fp32 values stay in the CPU's memory (`frozen_parts`), each data-parallel rank having its part, so that a checkpoint
holds them as they came.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llm.parallel.collectives import all_gather
from llm.slices import slice_of
from llm.train.engines.base import Fragment


def frozen_parts(stage: int, parameters: Mapping[str, Any], dp_size: int) -> dict[str, Tensor]:
    """Memory for this rank's part of each parameter that is not trained: fp32 zeros [as long on every rank]."""
    frozen = {name: parameter for name, parameter in parameters.items() if not parameter.requires_grad and stage > 0}
    sizes = {name: p.ds_tensor.numel() if stage == 3 else -(-p.numel() // dp_size) for name, p in frozen.items()}
    return {name: torch.zeros(size, device="cpu") for name, size in sizes.items()}


def fragments(
    stage: int, optimizer: Any, parameters: Mapping[str, Any], frozen: Mapping[str, Tensor], dp_rank: int
) -> dict[str, Fragment]:
    """This rank's fragments of the parameters of which it holds any; optimizer: DeepSpeed's."""
    found = {}
    for name, parameter in parameters.items():
        if stage == 0:
            flat, offset, start, numel = parameter, 0, 0, parameter.numel()
        elif name in frozen:
            flat, offset, numel = frozen[name], 0, frozen[name].numel()
            start = dp_rank * numel
        elif stage == 3:
            group, offset, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
            flat, start = optimizer.fp32_partitioned_groups_flat[group], dp_rank * numel
        elif parameter._hp_mapping is not None:
            mapping = parameter._hp_mapping
            flats = getattr(optimizer, "fp32_groups_flat_partition", None)  # BF16_Optimizer; else stages 1 and 2
            flats = flats if flats is not None else optimizer.single_partition_of_fp32_groups
            lp, hp = mapping.lp_fragment_address, mapping.hp_fragment_address
            flat, offset, start, numel = flats[mapping.param_group_index], hp.start, lp.start, hp.numel
        else:
            continue
        # Less what pads the last partition and the vocabulary, both of which come last in the flat order.
        numel = min(numel, slice_of(parameter).numel - start)
        if numel > 0:
            found[name] = Fragment(flat, offset, start, numel)
    return found


@torch.no_grad()
def publish(
    stage: int, optimizer: Any, parameters: Mapping[str, Any], frozen: Mapping[str, Tensor], group: dist.ProcessGroup
) -> None:
    """Copy fp32 fragments to the weights that the forward pass uses. Collective over the data-parallel `group`."""
    for name, part in frozen.items():
        if stage == 3:
            parameters[name].ds_tensor.copy_(part)
        else:
            weight = parameters[name]
            parts = all_gather(part.to(weight), group.size(), group.group_name)
            weight.copy_(parts.flatten()[: weight.numel()].view_as(weight))
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        for number in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        persistent = optimizer.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)
