"""What engines share: validation, the gradient's norm and clipping, and gathering tensor-parallel slices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llm.model.layers import IGNORED_TARGET
from llm.parallel.collectives import all_gather
from llm.parallel.mesh import Mesh
from llm.slices import Slice
from llm.train.engines.base import MicroBatch, sum_over


def evaluate_batches(
    model: nn.Module, micro_batches: Iterable[MicroBatch], group: dist.ProcessGroup | None
) -> tuple[float, int]:
    """Engine.evaluate for a model that is called directly; `group`: the data-parallel ranks, None if alone."""
    model.eval()
    total = torch.zeros(2, dtype=torch.float64)
    device = torch.device("cpu")
    with torch.no_grad():
        for batch in micro_batches:
            device = batch.targets.device  # not the parameters', which may be offloaded
            total[0] += model(*batch).double().cpu()
            total[1] += (batch.targets != IGNORED_TARGET).sum().cpu()
    model.train()
    sum_over(total, group, device)
    return float(total[0]), int(total[1])


def global_norm(parameters: Sequence[Tensor], mesh: Mesh | None) -> Tensor:
    """2-norm of all gradients of the model, fp32: a tensor-parallel shard counts once, a replica once."""
    grads = {True: [], False: []}
    for parameter in parameters:
        if parameter.grad is not None:
            grads[getattr(parameter, "tensor_model_parallel", False)].append(parameter.grad)
    squares = {split: sum_of_squares(tensors) for split, tensors in grads.items()}
    if mesh is not None and mesh.tp_size > 1:
        dist.all_reduce(squares[True], group=mesh.tp_group)
    return (squares[True] + squares[False]).sqrt()


def sum_of_squares(tensors: list[Tensor]) -> Tensor:
    if not tensors:
        return torch.zeros(())
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float32)).square().sum()


def clip(parameters: Sequence[Tensor], norm: Tensor, limit: float) -> None:
    """Scale all gradients by limit / norm if the norm is above the limit (Pascanu et al. 2013); 0: no limit."""
    if limit > 0 and norm > limit:
        grads = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_mul_(grads, limit / (norm + 1e-6))


def gather_slices(local: Tensor, part: Slice, mesh: Mesh | None) -> Tensor:
    """The global tensor of which every tensor-parallel rank holds the slice `part` (perhaps with padding rows)."""
    if part.is_whole or mesh is None or mesh.tp_size == 1:
        return local
    gathered = all_gather(local, mesh.tp_size, mesh.tp_group.group_name)
    joined = torch.cat(list(gathered), dim=part.dim)
    return joined.narrow(part.dim, 0, part.global_shape[part.dim])
