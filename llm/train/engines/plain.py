"""The plain PyTorch engine, one process or data parallel: the others are compared with it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llm.config import RunConfig
from llm.model.build import Model
from llm.parallel.mesh import Mesh
from llm.train.engines.base import DTYPES, Fragment
from llm.train.engines.masters import MasterWeightsEngine
from llm.train.engines.shared import global_norm
from llm.train.stragglers import Stopwatch


class PlainEngine(MasterWeightsEngine):
    """Whole weights on every rank; in bf16 and fp16 the model is a copy of the masters in the lower precision."""

    replicated = True

    def __init__(self, config: RunConfig, model: Model, mesh: Mesh | None, device: torch.device) -> None:
        model = model.to(device=device, dtype=DTYPES[config.train.precision])
        masters: dict[str, Tensor] = dict(model.named_parameters())
        self.copied = config.train.precision != "fp32"
        if self.copied:
            masters = {name: p.detach().float().requires_grad_(p.requires_grad) for name, p in masters.items()}
        super().__init__(config, model, masters, mesh, device)
        if self.dp_group is not None and self.dp_group.size() > 1:
            self.waits["dp"] = Stopwatch(device, running=False)

    def _fragments(self) -> dict[str, Fragment]:
        return {name: Fragment(master, 0, 0, master.numel()) for name, master in self.masters.items()}

    def _accumulate(self) -> None:
        """Add the low-precision gradients of one micro-batch to the fp32 ones of the masters."""
        if self.copied:
            masters: list[Any] = [self.masters[name] for name in self.trained]
            first = all(master.grad is None for master in masters)
            for master in masters if first else ():
                master.grad = torch.empty_like(master)
            gradients: list[Any] = [self.parameters[name].grad for name in self.trained]
            join = torch._foreach_copy_ if first else torch._foreach_add_
            join([master.grad for master in masters], gradients)
            self.model.zero_grad()

    def _reduce(self) -> None:
        if self.dp_group is None or self.dp_group.size() == 1:
            return
        masters: list[Any] = [self.masters[name] for name in self.trained]
        flat = torch.cat([master.grad.flatten() for master in masters])
        with self.waits["dp"]:
            dist.all_reduce(flat, group=self.dp_group)
        for master, reduced in zip(masters, flat.split([master.numel() for master in masters]), strict=True):
            master.grad = reduced.view_as(master)

    def _norm(self) -> Tensor:
        return global_norm(list(self.masters.values()), None)

    @torch.no_grad()
    def _publish(self) -> None:
        if self.copied:
            torch._foreach_copy_(list(self.parameters.values()), list(self.masters.values()))

    def gradient(self, name: str) -> Tensor:
        grad = self.masters[name].grad
        assert grad is not None, f"no gradient of {name}: call forward_backward first"
        return grad

    def local_weight(self, name: str) -> Tensor:
        return self.parameters[name].detach()
