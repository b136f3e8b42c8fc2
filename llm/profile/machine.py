"""What the device can do at best: a matrix product and a copy, measured by the ranks of a run side by side."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from llm.profile.record import Machine


def measure(device: torch.device, dtype: torch.dtype) -> Machine:
    """The best of five after one to warm up: 2 n^3 FLOPs of an n x n product, bytes read and written of a copy."""
    on_gpu = device.type == "cuda"
    n, size = (8192, 1 << 30) if on_gpu else (512, 1 << 26)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    matmul = _best(lambda: torch.mm(a, b, out=product), device)
    copy = _best(lambda: target.copy_(source), device)
    return Machine(matmul_tflops=2 * n**3 / matmul / 1e12, copy_gbs=2 * size / copy / 1e9)


def _best(action: Callable[[], object], device: torch.device) -> float:
    """Seconds."""
    best = float("inf")
    for i in range(6):
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if i:
            best = min(best, time.perf_counter() - start)
    return best
