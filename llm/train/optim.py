"""AdamW, the weights that it decays, and the learning rate of each update."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from kernels.adamw import adamw_
from kernels.dispatch import why_not_triton
from llm.config import OptimConfig
from llm.config.lora import FACTORS


def decays(name: str) -> bool:
    """Whether weight decay applies to the parameter of this name: matrices, not norms and biases.

    Decided by name, because under ZeRO 3 every parameter looks one-dimensional: the weights of
    linears, embeddings and the head decay, and LoRA's factors; `bias` and what belongs to a `norm` does not.
    """
    *owners, kind = name.split(".")
    return kind in ("weight", *FACTORS) and not (owners and owners[-1].startswith("norm"))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters of `model` as groups for `adamw`: those that decay, then the others.

    The order within a group is that of `named_parameters`; a shared parameter comes once; a group
    without parameters is left out.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = {decay: [p for name, p in named if decays(name) == decay] for decay in (True, False)}
    return [{"params": found, "weight_decay": weight_decay * decay} for decay, found in groups.items() if found]


class KernelAdamW(torch.optim.AdamW):
    """torch.optim.AdamW with the same state, updated by kernels/adamw.py: one launch per parameter.

    As PyTorch's fused one it changes nothing in a step in which its attribute `found_inf`, fp32 [], is 1.

    What the kernel cannot update, such as float64 or what is offloaded to the CPU's memory, PyTorch's fused AdamW
    does. Of AdamW's options it knows those that `adamw` sets.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None, "a closure would need the loss again: call step()"
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            states = [self._state_of(p) for p in parameters]
            steps, skip = [state["step"] for state in states], getattr(self, "found_inf", None)
            torch._foreach_add_(steps, 1)
            for parameter, state in zip(parameters, states, strict=True):
                runs = why_not_triton(parameter.device, parameter.dtype) is None and parameter.is_contiguous()
                adamw_(
                    parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"], step=state["step"],
                    lr=group["lr"], betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"],
                    skip=skip, impl="triton" if runs else "torch",
                )  # fmt: skip
            if skip is not None:
                torch._foreach_sub_(steps, [skip] * len(steps))

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """Its state, made as the fused AdamW makes it."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state


def adamw(groups: list[dict[str, Any]], config: OptimConfig, impl: str = "auto") -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) over `parameter_groups`.

    impl: its form; all but "triton" are PyTorch's fused one, which moves as many bytes and needs one launch for all
    parameters. State and results are the same up to rounding, so a run may change from one to the other.
    """
    kind = KernelAdamW if impl == "triton" else torch.optim.AdamW
    return kind(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def skip_where(overflow: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Let the next step of an optimizer of `adamw` change nothing, not even its count, if `overflow`, bool [], is true.

    Decided on the device: the host need not know.
    """
    optimizer.found_inf = overflow.float()  # pyright: ignore[reportAttributeAccessIssue]


def learning_rate(config: OptimConfig, step: int, max_steps: int) -> float:
    """Learning rate of update number `step`, counted from 0.

    Rises linearly, reaching `lr` with update `warmup_steps - 1`. Then `cosine` falls along half a cosine (Loshchilov &
    Hutter 2017), and `wsd` stays at `lr` and falls linearly over the last `decay_fraction` of the run (Hu et al. 2024);
    both reach `min_lr` with the last update and stay there. A warm-up longer than the run is cut off by its end.
    """
    done = step + 1  # updates, this one included
    if done <= config.warmup_steps:
        return config.lr * done / config.warmup_steps
    start = config.warmup_steps
    if config.schedule == "wsd":
        start = max(start, max_steps - round(config.decay_fraction * max_steps))
    progress = (done - start) / max(1, max_steps - start)
    if progress <= 0:
        return config.lr
    if progress >= 1:
        return config.min_lr
    share = 1 - progress if config.schedule == "wsd" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + (config.lr - config.min_lr) * share
