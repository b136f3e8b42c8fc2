"""Functions that engines share: fp16's loss scale, validation, gradient norm and clipping, gathering of slices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llm.parallel.collectives import all_gather
from llm.parallel.mesh import Mesh
from llm.slices import Slice
from llm.train.engines.base import Measure, MicroBatch, sum_over


@dataclass(frozen=True)
class DynamicLossScale:
    """Dynamic loss scaling for fp16 (Micikevicius et al. 2018, section 3.2): the scale and its history.

    The loss is multiplied by the scale so that small gradients do not become zero in fp16. A step whose gradients
    overflow is skipped and the scale falls; after many good steps it rises. The same sequence as DeepSpeed's scaler.
    """

    scale: float | Tensor = 2.0**16
    """A number before the first update, as are the other two that change; then a tensor [] on the device."""
    window: int = 1000
    """Steps without overflow after which the scale doubles."""
    hysteresis: int = 2
    """Overflows since the last rise of the scale before it starts to fall."""
    minimum: float = 1.0
    remaining: int | Tensor = 2
    """Of `hysteresis`, how many are left."""
    good_steps: int | Tensor = 0
    """Steps without overflow since the last one with it."""

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps of it, JSON-ready; the other fields are settings. Waits for the device."""
        return {
            "scale": float(self.scale), "remaining": int(self.remaining), "good_steps": int(self.good_steps)
        }  # fmt: skip

    def update(self, overflow: Tensor) -> tuple[DynamicLossScale, Tensor]:
        """The state after a step whose gradients did or did not overflow, bool [], and whether it counts as skipped.

        An overflow at the smallest scale does not: the run has diverged. All is decided on the device of `overflow`.
        """
        scale, remaining, good_steps = (
            x if isinstance(x, Tensor) else torch.full((), x, dtype=dtype, device=overflow.device)
            for x, dtype in ((self.scale, torch.float64), (self.remaining, torch.int64), (self.good_steps, torch.int64))
        )
        # As in DeepSpeed, the scale rises one step after `window` good ones.
        rises = overflow.logical_not() & (good_steps > 0) & (good_steps % self.window == 0)
        stays = overflow & (remaining > 1)
        falls = overflow & stays.logical_not()
        lower = (scale / 2).clamp(min=self.minimum)
        after = replace(
            self,
            scale=torch.where(rises, 2 * scale, torch.where(falls, lower, scale)),
            remaining=torch.where(rises, self.hysteresis, remaining - stays.long()),
            good_steps=torch.where(overflow, 0, good_steps + 1),
        )
        return after, stays | falls & (scale > self.minimum)


def measure_batches(
    model: nn.Module,
    micro_batches: Iterable[MicroBatch],
    of: Measure,
    numbers: int,
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> list[float]:
    """Engine.measure for a model that is called directly; `group`: the data-parallel ranks, None if alone."""
    model.eval()
    total = torch.zeros(numbers, dtype=torch.float64, device=device)
    with torch.no_grad():
        for batch in micro_batches:
            total += of(model, batch)
    model.train()
    return sum_over(total, group).tolist()


def global_norm(parameters: Sequence[Tensor], mesh: Mesh | None) -> Tensor:
    """2-norm of all gradients of the model, fp32: a tensor-parallel shard counts once, a replica once."""
    grads = {True: [], False: []}
    for parameter in parameters:
        if parameter.grad is not None:
            grads[getattr(parameter, "tensor_model_parallel", False)].append(parameter.grad)
    squares = {split: sum_of_squares(tensors, parameters[0].device) for split, tensors in grads.items()}
    if mesh is not None and mesh.tp_size > 1:
        dist.all_reduce(squares[True], group=mesh.tp_group)
    return (squares[True] + squares[False]).sqrt()


def sum_of_squares(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Of all their elements, fp32 [] on `device`, on which they are."""
    if not tensors:
        return torch.zeros((), device=device)
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float32)).square().sum()


def clip(parameters: Sequence[Tensor], norm: Tensor, limit: float) -> None:
    """Scale all gradients by limit / norm if the norm is above the limit (Pascanu et al. 2013); 0: no limit.

    Decided where the norm is: below the limit they are multiplied by 1, which costs less than to wait for the norm.
    """
    if limit > 0:
        grads = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_mul_(grads, torch.where(norm > limit, limit / (norm + 1e-6), 1.0))


def gather_slices(local: Tensor, part: Slice, mesh: Mesh | None) -> Tensor:
    """The global tensor of which every tensor-parallel rank holds the slice `part` (perhaps with padding rows)."""
    if part.is_full or mesh is None or mesh.tp_size == 1:
        return local
    gathered = all_gather(local, mesh.tp_size, mesh.tp_group.group_name)
    joined = torch.cat(list(gathered), dim=part.dim)
    return joined.narrow(part.dim, 0, part.global_shape[part.dim])
