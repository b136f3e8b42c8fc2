"""The fp32 state that DeepSpeed keeps: where this rank's part of a parameter is at each ZeRO stage, for checkpoints.

Whatever the stage, the fp32 weights that the optimizer updates are a range of some tensor that is a key of the
optimizer's state, and that range is a flat range of the (tensor-parallel slice of the) parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llm.checkpoint.manifest import Piece
from llm.parallel.mesh import Mesh
from llm.slices import slice_of
from llm.train.engines.base import MOMENTS, WeightSource


class Fragment(NamedTuple):
    """`numel` elements from `offset` of `flat` are those from `start` of the flattened slice of a parameter."""

    flat: Tensor
    offset: int
    start: int
    numel: int

    @property
    def master(self) -> Tensor:
        return self.flat.detach().view(-1).narrow(0, self.offset, self.numel)

    def moment(self, adam: torch.optim.Optimizer, kind: str) -> Tensor:
        return adam.state[self.flat][kind].view(-1).narrow(0, self.offset, self.numel)


class ZeroState:
    """Master weights and moments of a model that DeepSpeed trains."""

    def __init__(
        self, stage: int, optimizer: Any, adam: torch.optim.Optimizer, parameters: Mapping[str, Any], mesh: Mesh
    ) -> None:
        """optimizer: DeepSpeed's, around `adam`; parameters: by name, as ZeRO has left them."""
        self.stage, self.optimizer, self.adam, self.mesh = stage, optimizer, adam, mesh
        self.parameters = parameters

    def pieces(self, *, moments: bool) -> Iterator[Piece]:
        """Engine.state_pieces; `moments`: whether there are any."""
        if self.stage == 0 and self.mesh.dp_rank != 0:
            return
        for name, parameter in self.parameters.items():
            part, fragment = slice_of(parameter), self._fragment(parameter)
            if fragment is None or (part.is_whole and self.mesh.tp_rank != 0):
                continue
            yield Piece(name, "master", part, fragment.start, fragment.master.float().cpu())
            for kind in MOMENTS if moments else ():
                moment = fragment.moment(self.adam, kind)
                yield Piece(name, kind, part, fragment.start, moment.float().cpu())

    @torch.no_grad()
    def load(self, source: WeightSource, optimizer_step: int) -> None:
        """Engine.load_pieces. Collective."""
        for name, parameter in self.parameters.items():
            fragment = self._fragment(parameter)
            if fragment is None:
                continue
            tensors = {"master": fragment.master}
            if optimizer_step:
                if fragment.flat not in self.adam.state:
                    moments = {kind: torch.zeros_like(fragment.flat) for kind in MOMENTS}
                    step = torch.tensor(float(optimizer_step), device=fragment.flat.device)
                    self.adam.state[fragment.flat] = {"step": step, **moments}
                tensors |= {kind: fragment.moment(self.adam, kind) for kind in MOMENTS}
            for kind, tensor in tensors.items():
                values = source.read_slice(name, kind, slice_of(parameter)).flatten()
                tensor.copy_(values.narrow(0, fragment.start, fragment.numel))
        self._publish()

    def _fragment(self, parameter: Any) -> Fragment | None:
        """This rank's fragment, without a vocabulary's padding rows, which come last; None: it has none."""
        fragment = self._stored(parameter)
        if fragment is None:
            return None
        numel = min(fragment.numel, slice_of(parameter).numel - fragment.start)
        return fragment._replace(numel=numel) if numel > 0 else None

    def _stored(self, parameter: Any) -> Fragment | None:
        """This rank's fragment as DeepSpeed stores it."""
        optimizer = self.optimizer
        if self.stage == 0:
            return Fragment(parameter, 0, 0, parameter.numel())
        if self.stage == 3:
            group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = self.mesh.dp_rank * size
            numel = min(size, parameter.ds_numel - start)
            return Fragment(optimizer.fp32_partitioned_groups_flat[group], offset, start, numel) if numel > 0 else None
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        flats = getattr(optimizer, "fp32_groups_flat_partition", None)  # BF16_Optimizer; else stages 1 and 2
        flats = flats if flats is not None else optimizer.single_partition_of_fp32_groups
        lp, hp = mapping.lp_fragment_address, mapping.hp_fragment_address
        return Fragment(flats[mapping.param_group_index], hp.start, lp.start, hp.numel)

    def _publish(self) -> None:
        """Copy changed fp32 fragments to the weights that the forward pass uses. Collective."""
        optimizer = self.optimizer
        if self.stage in (1, 2):
            optimizer.update_lp_params()
        elif self.stage == 3:
            for group in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            persistent = optimizer.persistent_parameters
            if persistent:
                persistent[0].partition(persistent)
                persistent[0].all_gather(persistent)
