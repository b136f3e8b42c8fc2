"""AdamW's update of fp32 weights: of one flat tensor, as ZeRO has it, and of a model's tensors one by one.

Bytes per weight: 12 read and 12 written of weight and moments, 4 read of an fp32 gradient; or 2 of a bf16 gradient,
which is scaled on the way, and 2 written of the bf16 copy. PyTorch's optimizers take those as further passes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.case import BenchCase, Setup, Thunk
from kernels.adamw import adamw_

# Weights of the GPT presets, and of a rank's share of 6.7B.
COUNTS = {"124M": 124_439_808, "350M": 354_823_168, "6.7B / 8": 832_000_000, "1.3B": 1_313_722_368}
SMALL = {"tiny": 100_003}
OPTIONS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
FUSED = {"apex FusedAdam": "apex.optimizers", "DeepSpeed FusedAdam": "deepspeed.ops.adam"}


@dataclass(frozen=True)
class Weights:
    """What the rivals share; each makes its own moments. gradients: bf16 where there are copies, else fp32."""

    parameters: list[Tensor]
    gradients: list[Tensor]
    copies: list[Tensor] | None
    scale: Tensor


def cases(device: torch.device, small: bool) -> Iterator[BenchCase]:
    for mixed, group in ((False, "fp32 gradient"), (True, "bf16 gradient and copy")):
        for name, count in (SMALL if small else COUNTS).items():
            yield case(device, name, [count], mixed, group)
    width = 64 if small else 768
    shapes = layer_counts(width) * (1 if small else 12)
    yield case(device, f"{len(shapes)} tensors, C={width}", shapes, False, "tensor by tensor")


def layer_counts(C: int) -> list[int]:
    """Elements of the tensors of one of GPT-2's blocks."""
    return [C, C, 3 * C * C, 3 * C, C * C, C, C, C, 4 * C * C, 4 * C, 4 * C * C, C]


def case(device: torch.device, name: str, counts: list[int], mixed: bool, group: str) -> BenchCase:
    N = sum(counts)
    return BenchCase(
        "adamw", "step", name, "weights", N, "float32", 15.0 * N, 28.0 * N, rivals(device, counts, mixed), group=group
    )


def rivals(device: torch.device, counts: list[int], mixed: bool) -> dict[str, Setup]:
    """Every optimizer on the same weights, which are made when the first is set up."""
    made: list[Weights] = []

    def weights() -> Weights:
        if not made:
            torch.manual_seed(0)
            dtype = torch.bfloat16 if mixed else torch.float32
            parameters = [torch.randn(n, device=device) for n in counts]
            gradients = [torch.randn(n, device=device, dtype=dtype) for n in counts]
            copies = [torch.empty_like(g) for g in gradients] if mixed else None
            made.append(Weights(parameters, gradients, copies, torch.full((), 0.5, device=device)))
        return made[0]

    def stock(**options: Any) -> Setup:
        return lambda: engine_step(weights(), lambda p: torch.optim.AdamW(p, **OPTIONS, **options))

    found = {
        "ingot": lambda: one_pass(weights(), "triton" if device.type == "cuda" else "torch"),
        "reference": lambda: one_pass(weights(), "reference"),
        "torch": stock(fused=True),
        "torch foreach": stock(foreach=True),
        "torch.compile": lambda: compiled(weights()),
    }
    if device.type == "cuda":
        for name, module in FUSED.items():
            found[name] = lambda module=module: engine_step(weights(), fused_adam(module))
    return found


def one_pass(weights: Weights, impl: str) -> Thunk:
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in weights.parameters]
    step = torch.full((), 10.0, device=weights.scale.device)
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


def compiled(weights: Weights) -> Thunk:
    """The reference's formula, with the same casts, fused by the compiler."""
    parameters, gradients = weights.parameters, weights.gradients
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    copies = weights.copies or [None] * len(moments)
    step = torch.full((), 10.0, device=weights.scale.device)
    (beta1, beta2), lr = OPTIONS["betas"], OPTIONS["lr"]

    @torch.compile
    def run() -> None:
        for p, g, (m, v), copy in zip(parameters, gradients, moments, copies, strict=True):
            wide = g.float() * weights.scale if copy is not None else g
            m.lerp_(wide, 1 - beta1)
            v.mul_(beta2).addcmul_(wide, wide, value=1 - beta2)
            denominator = v.sqrt() / (1 - beta2**step).sqrt() + OPTIONS["eps"]
            p.mul_(1 - lr * OPTIONS["weight_decay"]).sub_(lr / (1 - beta1**step) * m / denominator)
            if copy is not None:
                copy.copy_(p)

    return run


def fused_adam(module: str) -> Callable[[list[Tensor]], Any]:
    """FusedAdam of apex or DeepSpeed, which is AdamW by its option."""
    make = importlib.import_module(module).FusedAdam
    return lambda parameters: make(parameters, adam_w_mode=True, **OPTIONS)
