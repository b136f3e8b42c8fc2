"""The fp32 optimizer state as checkpoints see it: flat ranges of the slices of named parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from llm.checkpoint.manifest import Piece
from llm.slices import Slice
from llm.train.engines.base import MOMENTS, WeightSource


class Fragment(NamedTuple):
    """`numel` elements from `offset` of `flat` are those from `start` of the flattened slice of a parameter.

    `flat` holds fp32 weights and is a key of the optimizer's state. A vocabulary's padding rows are not counted.
    """

    flat: Tensor
    offset: int
    start: int
    numel: int

    def tensors(self, optimizer: Optimizer, *, moments: bool) -> dict[str, Tensor]:
        """Views [numel] of the master weights, and of the moments if asked for."""
        tensors = {"master": self.flat.detach()}
        if moments:
            tensors |= {kind: optimizer.state[self.flat][kind] for kind in MOMENTS}
        return {kind: tensor.view(-1).narrow(0, self.offset, self.numel) for kind, tensor in tensors.items()}


def state_pieces(
    fragments: Mapping[str, Fragment], slices: Mapping[str, Slice], optimizer: Optimizer, *, tp_rank: int, moments: bool
) -> Iterator[Piece]:
    """What a rank writes of its fragments: of what all tensor-parallel ranks hold, the first one's."""
    for name, fragment in fragments.items():
        if fragment.numel == 0 or (slices[name].is_full and tp_rank != 0):
            continue
        for kind, tensor in fragment.tensors(optimizer, moments=moments).items():
            yield Piece(name, kind, slices[name], fragment.start, tensor.float().cpu())


@torch.no_grad()
def load_state(
    fragments: Mapping[str, Fragment],
    slices: Mapping[str, Slice],
    optimizer: Optimizer,
    source: WeightSource,
    optimizer_step: int,
) -> None:
    """Fill the fragments' master weights, and moments if optimizer_step > 0."""
    for name, fragment in fragments.items():
        flat = fragment.flat
        if optimizer_step:
            if flat not in optimizer.state:  # several fragments may lie in one tensor
                optimizer.state[flat] = {kind: torch.zeros_like(flat, requires_grad=False) for kind in MOMENTS}
            optimizer.state[flat]["step"] = torch.tensor(float(optimizer_step), device=flat.device)
        for kind, tensor in fragment.tensors(optimizer, moments=optimizer_step > 0).items() if fragment.numel else ():
            values = source.read_slice(name, kind, slices[name]).flatten()
            tensor.copy_(values.narrow(0, fragment.start, fragment.numel))
