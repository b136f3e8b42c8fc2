"""Functions that engines share: fp16's loss scale, validation, gradient norm and clipping, gathering of slices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llm.model.layers import IGNORED_TARGET
from llm.parallel.collectives import all_gather
from llm.parallel.mesh import Mesh
from llm.slices import Slice
from llm.train.engines.base import MicroBatch, sum_over


@dataclass(frozen=True)
class DynamicLossScale:
    """Dynamic loss scaling for fp16 (Micikevicius et al. 2018, section 3.2): the scale and its history.

    The loss is multiplied by the scale so that small gradients do not become zero in fp16. A step whose gradients
    overflow is skipped and the scale falls; after many good steps it rises. The same sequence as DeepSpeed's scaler.
    """

    scale: float = 2.0**16
    window: int = 1000
    """Steps without overflow after which the scale doubles."""
    hysteresis: int = 2
    """Overflows since the last rise of the scale before it starts to fall."""
    minimum: float = 1.0
    remaining: int = 2
    """Of `hysteresis`, how many are left."""
    good_steps: int = 0
    """Steps without overflow since the last one with it."""

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps of it, JSON-ready; the other fields are settings."""
        return {"scale": self.scale, "remaining": self.remaining, "good_steps": self.good_steps}

    def update(self, overflow: bool) -> DynamicLossScale:
        """The state after a step whose gradients did or did not overflow.

        Raises:
            FloatingPointError: an overflow at the smallest scale: the run has diverged.
        """
        if not overflow:
            count = self.good_steps + 1
            # As in DeepSpeed, the scale rises one step after `window` good ones.
            if self.good_steps == 0 or self.good_steps % self.window:
                return replace(self, good_steps=count)
            return replace(self, scale=2 * self.scale, remaining=self.hysteresis, good_steps=count)
        if self.remaining > 1:
            return replace(self, remaining=self.remaining - 1, good_steps=0)
        if self.scale <= self.minimum:
            raise FloatingPointError(
                f"gradients overflow fp16 at the smallest loss scale ({self.minimum}): the run has "
                "diverged; lower optim.lr, raise optim.warmup_steps or use train.precision=bf16"
            )
        return replace(self, scale=max(self.scale / 2, self.minimum), good_steps=0)


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
    """Scale all gradients by limit / norm if the norm is above the limit (Pascanu et al. 2013); 0: no limit.

    PyTorch's clip_grads_with_norm_ goes through all gradients where nothing is to be scaled, too.
    """
    if limit > 0 and norm > limit:
        grads = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_mul_(grads, limit / (norm + 1e-6))


def gather_slices(local: Tensor, part: Slice, mesh: Mesh | None) -> Tensor:
    """The global tensor of which every tensor-parallel rank holds the slice `part` (perhaps with padding rows)."""
    if part.is_full or mesh is None or mesh.tp_size == 1:
        return local
    gathered = all_gather(local, mesh.tp_size, mesh.tp_group.group_name)
    joined = torch.cat(list(gathered), dim=part.dim)
    return joined.narrow(part.dim, 0, part.global_shape[part.dim])
