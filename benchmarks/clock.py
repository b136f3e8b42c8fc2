"""Times calls on a CPU or a GPU, several candidates in turns, and describes the machine."""

import contextlib
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

# What is timed. Its result, if it has one, is for whoever compares the candidates.
Thunk = Callable[[], object]
T = TypeVar("T")

FLUSH_BYTES = 256 * 2**20  # overwritten before each call: several times the L2 of any GPU
MOST_FLUSHES = 32
MOST_REPEATS = 20  # of one turn
TURN_SECONDS = 0.005
WARM_UP = 2  # calls of `compare` that are not timed


@dataclass(frozen=True)
class Sample:
    """One call: seconds on the device, and seconds until the call returned to the host."""

    device: float
    host: float


class Clock(Protocol):
    """Times calls on one device. rounds: how many turns a candidate needs; method: how it times, in words."""

    rounds: int
    method: str

    def turn(self, thunk: Thunk) -> list[Sample]:
        """Time a few calls in a row. The thunk has been called before."""
        ...


class CudaClock:
    """Times by events; with `cold`, each call with a cold L2 and with a full queue.

    Before each cold call the GPU overwrites a buffer larger than its L2, as often as it takes to outlast the host's
    part of the call: all kernels of the call are then queued before the first starts, and the events hold GPU time
    alone. Without `cold` the time includes gaps in which the GPU waits for the host, as it does in training.
    """

    rounds = 10

    def __init__(self, device: torch.device, *, cold: bool) -> None:
        self.device, self.cold = device, cold
        self.method = "CUDA events, in turns"
        if cold:
            self.method += f", {FLUSH_BYTES >> 20} MiB overwritten before each call for as long as the host queues it"
            self.buffer = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
            self._timed(self.buffer.zero_, 3, 1)
            self.flush_seconds = statistics.median(s.device for s in self._timed(self.buffer.zero_, 10, 1))

    def turn(self, thunk: Thunk) -> list[Sample]:
        first = self._timed(thunk, 1, int(self.cold))[0]
        flushes, seconds = 0, first.device
        if self.cold:
            flushes = min(MOST_FLUSHES, math.ceil(1.5 * first.host / self.flush_seconds) + 1)
            seconds += flushes * self.flush_seconds
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
    method = "the host's clock, in turns, warm caches"

    def turn(self, thunk: Thunk) -> list[Sample]:
        samples = []
        for _ in range(2):
            began = time.perf_counter()
            thunk()
            seconds = time.perf_counter() - began
            samples.append(Sample(seconds, seconds))
        return samples


def clock_of(device: torch.device, *, cold: bool = True) -> Clock:
    return CudaClock(device, cold=cold) if device.type == "cuda" else CpuClock()


def rotated(candidates: Sequence[T], turn: int) -> list[T]:
    """The candidates in the order of a round: rotated by one each round, so that none is always first."""
    first = turn % max(1, len(candidates))
    return [*candidates[first:], *candidates[:first]]


def alternate(candidates: Sequence[T], rounds: int) -> Iterator[T]:
    """Each candidate once a round, so that a slow spell of the machine hits all of them."""
    for turn in range(rounds):
        yield from rotated(candidates, turn)


def compare(clock: Clock, thunks: Mapping[T, Thunk], rounds: int) -> dict[T, list[Sample]]:
    """Warm up every thunk, then time them in turns."""
    for thunk in thunks.values():
        for _ in range(WARM_UP):
            thunk()
    samples: dict[T, list[Sample]] = {name: [] for name in thunks}
    for name in alternate(list(thunks), rounds):
        samples[name] += clock.turn(thunks[name])
    return samples


def summary(samples: Sequence[Sample]) -> dict[str, float]:
    """Median, 20th and 80th percentile of the device's milliseconds, median of the host's, and how many calls."""
    low, middle, high = (float(q) * 1e3 for q in np.quantile([s.device for s in samples], (0.2, 0.5, 0.8)))
    host = statistics.median(s.host for s in samples) * 1e3
    return {"ms": middle, "ms_p20": low, "ms_p80": high, "host_ms": host, "calls": len(samples)}


def machine(device: torch.device, packages: Sequence[str]) -> dict[str, Any]:
    """The hardware, the system, the load average before the run, and those of the packages that are installed."""
    on_gpu = device.type == "cuda"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    versions = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        "packages": versions,
        "load": os.getloadavg()[0],
    }
