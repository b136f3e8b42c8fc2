"""Finds where DeepSpeed keeps this rank's part of a parameter's fp32 state, at each ZeRO stage.

At every stage the fp32 weights that the optimizer updates are a range of some tensor that is a key of the optimizer's
state. That range is a flat range of the parameter, or of its tensor-parallel slice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm.slices import slice_of
from llm.train.engines.base import Fragment


def fragments(stage: int, optimizer: Any, parameters: Mapping[str, Any], dp_rank: int) -> dict[str, Fragment]:
    """This rank's fragments of the parameters of which it holds any; optimizer: DeepSpeed's."""
    found = {}
    for name, parameter in parameters.items():
        if stage == 0:
            flat, offset, start, numel = parameter, 0, 0, parameter.numel()
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


def publish(stage: int, optimizer: Any) -> None:
    """Copy changed fp32 fragments to the weights that the forward pass uses. Collective."""
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        persistent = optimizer.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)
