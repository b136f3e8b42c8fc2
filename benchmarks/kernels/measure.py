"""Seconds of a call, and what the machine's memory and matrix units can do."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Protocol

import torch

from benchmarks.kernels.case import Thunk

FLUSH_BYTES = 256 * 2**20  # overwritten before each call: several times the L2 of any GPU
MOST_FLUSHES = 32
MOST_REPEATS = 20  # of one turn
TURN_SECONDS = 0.005
PACKAGES = (
    "torch", "triton", "liger-kernel", "quack-kernels", "nvidia-cutlass-dsl", "flash-attn", "flash-attn-3",
    "flash-attn-4", "cut-cross-entropy", "apex", "transformer-engine", "deepspeed",
)  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """One call: seconds on the device, and seconds until the call returned to the host."""

    device: float
    host: float


class Clock(Protocol):
    """Times calls on one device."""

    rounds: int
    method: str

    def turn(self, thunk: Thunk) -> list[Sample]:
        """Time a few calls in a row. The thunk has been called before."""
        ...


class CudaClock:
    """Times by events, each call with a cold L2 and with a full queue.

    Before each call the GPU overwrites a buffer larger than its L2, as often as it takes to outlast the host's part of
    the call: all kernels of the call are then queued before the first starts, and the events hold GPU time alone.
    """

    rounds = 10
    method = (
        f"CUDA events, rivals in turns, {FLUSH_BYTES >> 20} MiB overwritten before each call for as long as the host "
        f"takes to queue it"
    )

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffer = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
        self._timed(self.buffer.zero_, 3, 1)
        self.flush_seconds = statistics.median(s.device for s in self._timed(self.buffer.zero_, 10, 1))

    def turn(self, thunk: Thunk) -> list[Sample]:
        first = self._timed(thunk, 1, 1)[0]
        flushes = min(MOST_FLUSHES, math.ceil(1.5 * first.host / self.flush_seconds) + 1)
        seconds = first.device + flushes * self.flush_seconds
        return self._timed(thunk, max(1, min(MOST_REPEATS, int(TURN_SECONDS / seconds))), flushes)

    def _timed(self, thunk: Thunk, repeats: int, flushes: int) -> list[Sample]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        host = []
        for start, end in events:
            for _ in range(flushes):
                self.buffer.zero_()
            start.record()
            began = time.perf_counter()
            thunk()
            host.append(time.perf_counter() - began)
            end.record()
        torch.cuda.synchronize(self.device)
        return [Sample(a.elapsed_time(b) / 1e3, seconds) for (a, b), seconds in zip(events, host, strict=True)]


class CpuClock:
    """Times by the host's clock, with whatever the caches hold."""

    rounds = 3
    method = "the host's clock, rivals in turns, warm caches"

    def turn(self, thunk: Thunk) -> list[Sample]:
        samples = []
        for _ in range(2):
            began = time.perf_counter()
            thunk()
            seconds = time.perf_counter() - began
            samples.append(Sample(seconds, seconds))
        return samples


def clock_of(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def summary(samples: Sequence[Sample]) -> dict[str, float]:
    """Median, 20th and 80th percentile of the device's milliseconds, median of the host's, and how many calls."""
    low, middle, high = (quantile([s.device for s in samples], q) * 1e3 for q in (0.2, 0.5, 0.8))
    host = statistics.median(s.host for s in samples) * 1e3
    return {"ms": middle, "ms_p20": low, "ms_p80": high, "host_ms": host, "calls": len(samples)}


def quantile(values: Sequence[float], q: float) -> float:
    """By linear interpolation between the two nearest of the sorted values."""
    ordered, place = sorted(values), q * (len(values) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def machine(device: torch.device) -> dict[str, Any]:
    """What is measured on, and the versions of the packages that are measured."""
    on_gpu = device.type == "cuda"
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda if on_gpu else None,
        "packages": versions,
    }


def machine_limits(device: torch.device, clock: Clock) -> dict[str, float]:
    """GB/s of a copy, bytes read plus bytes written, and TFLOP/s of a square matrix product, on random data."""
    on_gpu = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if on_gpu else (512, torch.float32)
    copied = 2**30 if on_gpu else 2**26
    source = torch.randint(0, 100, (copied,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    seconds = []
    for thunk in (lambda: target.copy_(source), lambda: torch.mm(a, b, out=product)):
        clock.turn(thunk)
        seconds.append(statistics.median(s.device for _ in range(5) for s in clock.turn(thunk)))
    return {"copy_gb_s": 2 * copied / seconds[0] / 1e9, "matmul_tflop_s": 2 * size**3 / seconds[1] / 1e12}
