"""AdamW in plain PyTorch, and the stochastic rounding of what it writes."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.philox import WORD, philox
from kernels.reference.wide import wide


def adamw_(
    parameter: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *,
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float, step: int | Tensor,
    grad_scale: Tensor | None = None, low_precision: Tensor | None = None, seed: int | None = None,
) -> None:  # fmt: skip
    """Algorithm 2 of Loshchilov & Hutter (2019); see kernels.adamw.adamw_."""
    g = wide(gradient) if grad_scale is None else wide(gradient) * grad_scale
    m = wide(exp_avg) + (1 - betas[0]) * (g - wide(exp_avg))
    v = betas[1] * wide(exp_avg_sq) + (1 - betas[1]) * g.square()
    t = int(step)
    root = (1 - betas[1] ** t) ** 0.5
    step_size = lr / (1 - betas[0] ** t)
    p = (1 - lr * weight_decay) * wide(parameter) - step_size * (m / (v.sqrt() / root + eps))
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
    target = parameter if low_precision is None else low_precision
    if target is not parameter:
        parameter.copy_(p)
    target.copy_(p if seed is None else stochastic(p, target.dtype, seed, t))


def stochastic(x: Tensor, dtype: torch.dtype, seed: int, step: int) -> Tensor:
    """fp32 x rounded to a neighbour in bfloat16 or float16, up with the share of the gap that lies below x.

    The bits added before cutting off are those of Philox4x32-10 (kernels/philox.py) with
        key      seed, step
        counter  low and high word of index // 4, 0, 2^32 - 1 (which no dropout mask has)
        output   number index % 4 of the four
    for the element of this index in the flattened tensor.
    """
    x = x.float()
    groups = torch.arange((x.numel() + 3) // 4, device=x.device)
    zero = torch.zeros_like(groups)
    words = philox((groups & WORD, groups >> 32, zero, zero + WORD), (seed & WORD, step & WORD))
    noise = torch.stack(words, -1).flatten()[: x.numel()].view(x.shape)
    dropped = {torch.bfloat16: 16, torch.float16: 13}[dtype]
    noise = noise & ((1 << dropped) - 1)
    bits = (x.contiguous().view(torch.int32).long() & WORD) + noise
    bits = bits >> dropped << dropped
    rounded = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)
    if dtype == torch.float16:  # subnormal numbers are multiples of 2^-24
        small = (x.abs() * 2**24 + noise * 2.0**-13).floor() * 2.0**-24
        rounded = torch.where(x.abs() < 2.0**-14, small.copysign(x), rounded)
    return torch.where(x.isnan(), x, rounded).to(dtype)
