"""The cases of AdamW: fp32 weights in one flat tensor, as ZeRO has them, and in a model's tensors one by one.

Bytes per weight: 12 read and 12 written of weight and moments, and 4 read of an fp32 gradient. Or 2 read of a bf16
gradient, scaled in the same pass, and 2 written of the bf16 copy. PyTorch's optimizers need further passes for these.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from benchmarks.clock import Thunk
from benchmarks.kernels.case import Case, Contest, Setup, name_of
from kernels.adamw import adamw_

# Weights of the GPT presets, and of a rank's share of 6.7B.
COUNTS = {"124M": 124_439_808, "350M": 354_823_168, "6.7B / 8": 832_000_000, "1.3B": 1_313_722_368}
SMALL = {"tiny": 100_003}
OPTIONS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
FUSED = {"apex FusedAdam": "apex.optimizers", "DeepSpeed FusedAdam": "deepspeed.ops.adam"}


def case(
    device: torch.device, dtype: torch.dtype, N: int, *, gradient: torch.dtype | None = None,
    low: torch.dtype | None = None, seed: int | None = None, scalars: bool = False,
) -> Case:  # fmt: skip
    """One update of N weights in `dtype`, in place. gradient: its dtype, the weights' if None. low: that of the 16-bit
    copy, if there is one. seed: of stochastic rounding. scalars: the step and the gradient's scale are tensors.
    """
    torch.manual_seed(0)
    p, g, m, v = (torch.randn(N, device=device) for _ in range(4))
    tensors = (p.to(dtype), g.to(gradient or dtype), (m * 0.1).to(dtype), (v.abs() * 0.1).to(dtype))
    options: dict[str, Any] = {"step": 10, "seed": seed}
    if scalars:
        options |= {"step": torch.full((), 10.0, device=device), "grad_scale": torch.full((), 0.3, device=device)}
    if low is not None:
        options["low_precision"] = torch.empty(N, dtype=low, device=device)

    def function(p: Tensor, g: Tensor, m: Tensor, v: Tensor, impl: str) -> list[Tensor]:
        adamw_(p, g, m, v, impl=impl, **OPTIONS, **options)
        return [p, m, v, *([] if low is None else [options["low_precision"]])]

    name = f"N={N}" + "".join(f" {what}={name_of(x)}" for what, x in (("gradient", gradient), ("copy", low)) if x)
    return Case(name + " stochastic" * (seed is not None) + " scalars" * scalars, function, tensors)


def compiled(dtype: torch.dtype) -> Iterator[Case]:
    """Weights in `dtype`; in fp32 also with 16-bit gradients and copies."""
    kinds: list[tuple[torch.dtype | None, torch.dtype | None]] = [(None, None)]
    if dtype == torch.float32:
        for low in (torch.bfloat16, torch.float16):
            kinds += [(low, None), (low, low), (None, low)]
    for gradient, low in kinds:
        for seed in (None, 3) if (low or dtype) != torch.float32 else (None,):
            for scalars in (False, True):
                flags = {"gradient": gradient, "low": low, "seed": seed, "scalars": scalars}
                yield case(torch.device("cpu"), dtype, 3000, **flags)


def contests(device: torch.device, small: bool) -> Iterator[Contest]:
    C = 64 if small else 768
    block = [C, C, 3 * C * C, 3 * C, C * C, C, C, C, 4 * C * C, 4 * C, 4 * C * C, C]  # elements of GPT-2's tensors
    tensors = block * (1 if small else 12)
    flat = [(name, [count]) for name, count in (SMALL if small else COUNTS).items()]
    groups = {
        "fp32 gradient": flat,
        "bf16 gradient and copy": flat,
        "tensor by tensor": [(f"{len(tensors)} tensors, C={C}", tensors)],
    }
    for group, models in groups.items():
        for name, counts in models:
            N, made = sum(counts), rivals(device, counts, mixed=group.startswith("bf16"))
            yield Contest("adamw", "step", name, "weights", N, torch.float32, 28.0 * N, made, 15.0 * N, group)


@dataclass(frozen=True)
class Weights:
    """What the rivals share; each makes its own moments. gradients: bf16 where there are copies, else fp32."""

    parameters: list[Tensor]
    gradients: list[Tensor]
    copies: list[Tensor] | None
    scale: Tensor


def rivals(device: torch.device, counts: list[int], mixed: bool) -> dict[str, Setup]:
    """Every optimizer on the same weights."""
    torch.manual_seed(0)
    parameters = [torch.randn(n, device=device) for n in counts]
    gradients = [torch.randn(n, device=device, dtype=torch.bfloat16 if mixed else torch.float32) for n in counts]
    copies = [torch.empty_like(g) for g in gradients] if mixed else None
    weights = Weights(parameters, gradients, copies, torch.full((), 0.5, device=device))

    def stock(**options: Any) -> Setup:
        return lambda: engine_step(weights, partial(torch.optim.AdamW, **OPTIONS, **options))

    def fused(module: str) -> Setup:
        options = OPTIONS | {"adam_w_mode": True}
        return lambda: engine_step(weights, partial(import_module(module).FusedAdam, **options))

    found = {
        "ingot": lambda: one_pass(weights, "triton" if device.type == "cuda" else "torch"),
        "reference": lambda: one_pass(weights, "reference"),
        "torch": stock(fused=True),
        "torch foreach": stock(foreach=True),
        "torch.compile": lambda: torch.compile(one_pass(weights, "reference")),
    }
    if device.type == "cuda":
        found |= {name: fused(module) for name, module in FUSED.items()}
    return found


def one_pass(weights: Weights, impl: str) -> Thunk:
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in weights.parameters]
    # The reference needs the number on the host.
    step = 10 if impl == "reference" else torch.full((), 10.0, device=weights.scale.device)
    scale = weights.scale if weights.copies else None
    copies = weights.copies or [None] * len(moments)

    def run() -> None:
        for p, g, (m, v), copy in zip(weights.parameters, weights.gradients, moments, copies, strict=True):
            adamw_(p, g, m, v, step=step, grad_scale=scale, low_precision=copy, impl=impl, **OPTIONS)

    return run


def engine_step(weights: Weights, make: Callable[[list[Tensor]], Any]) -> Thunk:
    """An optimizer's step, with the passes around it that our kernel saves where the gradient is bf16."""
    # Aliases: a rival must not put its gradients on the weights of another.
    parameters = [p.detach().requires_grad_() for p in weights.parameters]
    optimizer = make(parameters)

    def run() -> None:
        gradients = [g.float() for g in weights.gradients]
        if weights.copies:
            torch._foreach_mul_(gradients, weights.scale)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()
        if weights.copies:
            torch._foreach_copy_(weights.copies, [p.detach() for p in parameters])

    return run
