"""Computes the gradients of a step again, and compares their bits: a GPU that sometimes computes wrongly is found so.

Losses hardly show such a fault. Every kernel here gives the same bits each time (train.deterministic), so two results
that differ are one too many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from llm.errors import CorruptError
from llm.parallel.agreement import backend_device
from llm.train.engines.base import Engine, MicroBatch
from llm.train.guard import checksum

LOCAL, REDUCED = 0, 1


def gradient_sums(engine: Engine, micro_batches: Sequence[MicroBatch], target_count: int | Tensor) -> Tensor:
    """Checksums of a step's gradients, which changes nothing: int64 [2], of this rank's own samples and of what its
    optimizer is given once ranks have added theirs up. Collective.

    Under FSDP the first is 0: what it reduces are not the gradients of the model's own parameters.
    """
    sums = torch.zeros(2, dtype=torch.int64, device=engine.device)

    def add(which: int, gradient: Tensor) -> None:
        sums[which] += checksum(gradient).to(sums.device)

    def before_update(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    add(REDUCED, parameter.grad)

    hooks = [engine.optimizer.register_step_pre_hook(before_update)]
    hooks += [engine.parameters[name].register_hook(lambda grad: add(LOCAL, grad)) for name in engine.trained]
    scalars = engine.scalar_state()  # fp16's loss scale counts steps
    engine.forward_backward(micro_batches, target_count)
    engine.step(lambda norm: torch.ones_like(norm, dtype=torch.bool))
    engine.load_scalar_state(scalars)
    for hook in hooks:
        hook.remove()
    return sums


def replay(engine: Engine, micro_batches: Sequence[MicroBatch], target_count: int | Tensor) -> str | None:
    """Compare two computations of a step's gradients, and if they differ two more: a warning, or None. Collective.

    Tensor-parallel ranks add up gradients in their backward pass: of them all those of a group are named.

    Raises CorruptError, on every rank, if those differ too.
    """
    first = _odd_ranks(lambda: gradient_sums(engine, micro_batches, target_count))
    if first is None:
        return None
    again = _odd_ranks(lambda: gradient_sums(engine, micro_batches, target_count))
    if again is None:
        return f"{_named(first)} the second time, and the third and fourth agree: a passing fault, and the step is made"
    advice = "start again without this host, or if it comes back on others suspect a kernel that is not deterministic"
    raise CorruptError(f"{_named(again)} each of four times: {advice}", again)


def _odd_ranks(sums: Callable[[], Tensor]) -> list[int] | None:
    """The ranks whose own gradients differ between two computations; None if nothing differs anywhere. Collective."""
    differ = (sums() != sums()).to(backend_device(), torch.int64)
    gathered = [torch.empty_like(differ) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, differ)
    found = torch.stack(gathered).tolist()  # [rank][2]
    return [rank for rank, (local, _) in enumerate(found) if local] if any(map(any, found)) else None


def _named(ranks: Sequence[int]) -> str:
    """Whose gradients differ; of none if it cannot be told, as under FSDP or when the reduction is wrong."""
    who = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}" if ranks else "a rank, or the reduction,"
    return f"{who} gave other gradients"
