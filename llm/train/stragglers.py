"""Tells which rank is slower than the others, and in what, by times that hold no waiting for other ranks.

Ranks that wait for one another take the same time for a step. So only that is compared in which a rank is alone: the
wait for its loader, the forward passes, the update. Where tensor parallelism, ZeRO 3, FSDP or Muon communicate in one
of these, the others wait there, the times are alike, and nobody is named.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from llm.train.gpu_state import reasons

PHASES = ("load", "forward", "update")
# Over which a median is taken; fewer are noise. Two such windows are within 20 steps of when a rank becomes slow.
MIN_STEPS = 8
# A rank is slow that takes so much longer than the median of all ranks, if that is so great a share of a step.
FACTOR, SHARE = 1.5, 0.1


class Stopwatch:
    """Adds up the seconds of the blocks `with stopwatch:`, on a GPU as its events tell, for which nothing waits."""

    def __init__(self, device: torch.device, *, running: bool = True) -> None:
        self.on_gpu = device.type == "cuda"
        self.count = 0
        """Blocks begun."""
        self.running = running
        """Whether blocks are timed, which must not change within one."""
        self.marks: list[Any] = []

    def _mark(self) -> None:
        mark: Any = torch.cuda.Event(enable_timing=True) if self.on_gpu else time.perf_counter()
        if self.on_gpu:
            mark.record()
        self.marks.append(mark)

    def __enter__(self) -> None:
        self.count += 1
        if self.running:
            self._mark()

    def __exit__(self, *error: object) -> None:
        if self.running:
            self._mark()

    def take(self) -> Callable[[], float]:
        """What gives the seconds of the blocks since the last call, once all of them have ended on the GPU."""
        pairs, on_gpu = list(zip(self.marks[::2], self.marks[1::2], strict=True)), self.on_gpu
        self.marks = []
        return lambda: sum(start.elapsed_time(end) / 1000 if on_gpu else end - start for start, end in pairs)


class Stragglers:
    """Compares the ranks of `group`, on CPUs, by the median times of their steps; None: a process alone."""

    def __init__(self, group: dist.ProcessGroup | None, hosts: Sequence[str], say: Callable[[str], None]) -> None:
        self.group, self.hosts, self.say = group, hosts, say
        self.steps: list[tuple[float, ...]] = []
        self.slow, self.named = set[tuple[int, str]](), set[tuple[int, str]]()

    def step(self, *seconds: float) -> None:
        """A step of this rank took so long, by PHASES."""
        if self.group is not None:
            self.steps.append(seconds)

    def report(self, step: int, step_seconds: float, gpu: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """The `slowest` and the `fastest` rank of each phase, and their factors over the median. Collective.

        Empty after fewer than MIN_STEPS. Says who is slow for the second time in a row, and was not before.
        step_seconds: of a whole step, on average; gpu: the state of this rank's (GpuState.read).
        """
        if len(self.steps) < MIN_STEPS:
            return {}
        state = gpu.get("clock_mhz", math.nan), gpu.get("throttle_reasons", math.nan)
        mine = torch.tensor([*(statistics.median(times) for times in zip(*self.steps, strict=True)), *state])
        self.steps = []
        of_ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(of_ranks, mine, self.group)
        *times, clocks, bits = torch.stack(of_ranks).T.tolist()
        found, slow = {"slowest": {}, "fastest": {}}, dict[tuple[int, str], str]()
        for phase, seconds in zip(PHASES, times, strict=True):
            usual, worst, best = statistics.median_low(seconds), max(seconds), min(seconds)
            for name, extreme in (("slowest", worst), ("fastest", best)):
                found[name][f"{phase}_rank"] = seconds.index(extreme)
                found[name][f"{phase}_factor"] = extreme / max(usual, 1e-9)
            rank, factor = seconds.index(worst), worst / max(usual, 1e-9)
            if factor > FACTOR and worst - usual > SHARE * step_seconds:
                clock = "" if math.isnan(clocks[rank]) else f"; its GPU's clock is at {clocks[rank]:.0f} MHz"
                held = ", ".join(reasons(bits[rank]))
                why = clock + (f", throttled by {held}" if held else "")
                slow[rank, phase] = f"{phase} takes {worst:.3g} s, {factor:.1f} x the median{why}"
        again = slow.keys() & self.slow
        for rank, phase in again - self.named:
            self.say(f"warning: step {step}: rank {rank} on {self.hosts[rank]} is slow: {slow[rank, phase]}")
        self.slow, self.named = {*slow}, again
        return found
