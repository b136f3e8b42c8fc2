"""Reads a trace of torch.profiler: whose time each moment of the profiled steps was.

The host's thread, with the one that runs the backward pass where that is another, is swept once in the order of time.
Each moment belongs to the innermost range or operation around it, and so to one part, or to none:

- in the forward pass to the layer's range (llm/profile/ranges.py),
- in the backward pass to the part of the forward operation with the same sequence number,
- in a layer's range within the backward pass to that layer again, as recomputation,
- to `collectives` within one, and where no operation runs while one is under way in Gloo's threads.

A GPU's kernel belongs to the part in which the host launched it.
"""

from __future__ import annotations

import gzip
import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from llm.profile.costs import bytes_moved, fused_attention, matmul_flops, shapes_of
from llm.profile.ranges import CONTAINERS, PARTS, PREFIX, STEP_PARTS
from llm.profile.record import Collective, Host, Op, Part, Sync

Event: TypeAlias = dict[str, Any]
Span: TypeAlias = tuple[float, float]
NODE = "autograd::engine::evaluate_function: "
COLLECTIVES = ("c10d::", "_c10d_functional::", "gloo:", "nccl:", "mpi:")
NO_ARITHMETIC = (*COLLECTIVES, "autograd::", "torch::autograd", "profiler::")
SYNCS = (
    "aten::item",
    "aten::_local_scalar_dense",
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
)
READS = ("aten::item", "aten::is_nonzero", "aten::equal", "aten::allclose")
PHASES = ("forward", "backward", "recompute")
NCCL_SIZES = {"BFloat16": 2, "Half": 2, "Long": 8, "Byte": 1}
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")


def load(path: Path) -> list[Event]:
    """The events of a trace, gzipped or not."""
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        return json.load(file)["traceEvents"]


@dataclass
class Frame:
    """An event that the host is in."""

    name: str
    start: float
    end: float
    part: str | None
    phase: str
    arithmetic: bool
    event: Event
    counted: bool = False
    """Its bytes and FLOPs were, or those of what it calls."""
    flops: float = 0.0
    inner: int = 0
    """Events within it but `detach`, by which inputs are kept for the backward pass."""


@dataclass
class Sweep:
    """What one pass over the host's events gives. Microseconds, summed over the steps."""

    attention_flops: float = 0.0
    """Of the forward pass of one call of fused attention."""
    times: dict[tuple[str | None, str], float] = field(default_factory=lambda: defaultdict(float))
    ops: dict[tuple[str, str | None], list[float]] = field(default_factory=lambda: defaultdict(lambda: [0, 0.0]))
    """[calls, exclusive time] by name and part."""
    syncs: list[list[tuple[str | None, float]]] = field(default_factory=list)
    """Of each step: the part and the time of each, in order."""
    steps: list[Span] = field(default_factory=list)
    flops: dict[str | None, float] = field(default_factory=lambda: defaultdict(float))
    bytes: dict[str | None, float] = field(default_factory=lambda: defaultdict(float))
    idle: list[tuple[float, float, str | None, str]] = field(default_factory=list)
    """Stretches in which the host computes nothing, with part and phase."""
    launches: list[tuple[float, str, str, list[Any]]] = field(default_factory=list)
    """When each collective was called, its name, in what, and the shapes of each of its arguments."""
    launched_in: dict[int, str | None] = field(default_factory=dict)
    """The part of each kernel, by its correlation number."""
    calls: int = 0
    """Operations that compute."""
    forward: dict[int, str | None] = field(default_factory=dict)
    """The part of a forward operation, by its sequence number."""
    stack: list[Frame] = field(default_factory=list)
    now: float = 0.0

    def run(self, events: Iterable[Event]) -> Sweep:
        """events: complete ones of the host, and instants of its allocator, which `instant` gets."""
        for event in sorted(events, key=lambda e: (e["ts"], -e.get("dur", 0.0))):
            start = event["ts"]
            while self.stack and self.stack[-1].end <= start:
                self._leave()
            if self.stack or event["name"].startswith(PREFIX + "step "):
                self._advance(start)
                if event["ph"] == "X":
                    self._enter(event)
                else:
                    self.instant(event)
        while self.stack:
            self._leave()
        return self

    def instant(self, event: Event) -> None:
        """An instant event, the frames around which are `stack`."""

    def _advance(self, now: float) -> None:
        """Give the time since the last boundary to the innermost frame."""
        if self.stack and now > self.now:
            frame, passed = self.stack[-1], now - self.now
            self.times[frame.part, frame.phase] += passed
            self.ops[frame.name, frame.part][1] += passed
            if not any(each.arithmetic for each in self.stack):
                self.idle.append((self.now, now, frame.part, frame.phase))
        self.now = max(now, self.now)

    def _enter(self, event: Event) -> None:
        name, args = event["name"], event.get("args", {})
        parent = self.stack[-1] if self.stack else Frame("", 0.0, float("inf"), None, "forward", False, {})
        part, phase = _context(name, args, parent, self.forward)
        number = args.get("Sequence number")
        if number is not None and phase != "backward" and not args.get("Fwd thread id"):
            self.forward[number] = part  # of several, the last one made the node
        end = min(event["ts"] + event["dur"], parent.end)
        arithmetic = event["cat"] == "cpu_op" and "::" in name and not name.startswith(NO_ARITHMETIC)
        frame = Frame(name, event["ts"], end, part, phase, arithmetic, event)
        if name.startswith(PREFIX + "step "):
            self.steps.append((event["ts"], end))
            self.syncs.append([])
        if name.startswith(SYNCS) and self._waits(name):
            self.syncs[-1].append((part, end - event["ts"]))
        if name.startswith("c10d::"):
            inside = [each.name for each in self.stack]
            caller = next((each for each in inside if each.startswith("_c10d")), inside[-1])
            shapes = [[*shapes_of(dims)] for dims in args.get("Input Dims", [])]
            self.launches.append((event["ts"], name, caller, shapes))
        if "correlation" in args:
            self.launched_in[args["correlation"]] = part
        self.ops[name, part][0] += 1
        parent.inner += name != "aten::detach"
        self.stack.append(frame)

    def _waits(self, name: str) -> bool:
        """Whether the host waits here for a device or a number, and in nothing around this does so already.

        An operation that computes on a CPU reads numbers too, for which nobody waits.
        """
        around = [each.name for each in self.stack if each.arithmetic]
        return not any(each.startswith(SYNCS) for each in around) and (name.startswith("cuda") or {*around} <= {*READS})

    def _leave(self) -> None:
        self._advance(self.stack[-1].end)
        frame = self.stack.pop()
        name, parent = frame.name.removeprefix(PREFIX), self.stack[-1] if self.stack else None
        if frame.name.startswith("Optimizer.step#"):
            for each in self.stack:
                each.part = "publish" if each.part == "clip" else each.part
        elif parent is not None and parent.name in (PREFIX + "model", PREFIX + "block") and frame.name != name:
            parent.part = frame.part
        if frame.arithmetic:
            self._count(frame, parent)

    def _count(self, frame: Frame, parent: Frame | None) -> None:
        """Add up the arithmetic and the bytes of an operation, unless those within it or around it are counted."""
        name, dims, kinds = frame.name, frame.event["args"].get("Input Dims", []), frame.event["args"].get("Input type")
        # Recomputation leaves the last linear of a block before it is computed, which needs no more than its input.
        left = frame.phase == "recompute" and name == "aten::addmm" and not frame.inner
        products = 0.0 if left else matmul_flops(name, dims)
        around = any(matmul_flops(each.name, each.event.get("args", {}).get("Input Dims", [])) for each in self.stack)
        if around:
            return
        if products == 0 and frame.flops == 0 and not any(each.arithmetic for each in self.stack):
            products = fused_attention(name) * self.attention_flops
        self.flops[frame.part] += products
        if products or not frame.counted:
            moved = bytes_moved(name, dims, kinds or [])
            self.bytes[frame.part] += moved
            frame.counted = frame.counted or moved > 0
            self.calls += moved > 0
        if parent is not None:
            parent.flops += products + frame.flops
            parent.counted = parent.counted or frame.counted


def _context(name: str, args: Event, parent: Frame, forward: dict[int, str | None]) -> tuple[str | None, str]:
    """The part and the phase of an event within `parent`."""
    part, phase = parent.part, parent.phase
    if name.startswith(PREFIX):
        inner = name.removeprefix(PREFIX)
        part = inner if inner in PARTS else CONTAINERS.get(inner) or part
        return part, "recompute" if phase == "backward" and inner != "collectives" else phase
    if name.startswith(NODE):
        if name.endswith("AccumulateGrad"):
            return "gradients", "backward"
        return forward.get(args.get("Sequence number", -1), part), "backward"
    if name.startswith("Optimizer.step#"):
        return "optimizer", phase
    return ("collectives", phase) if name.startswith(COLLECTIVES) else (part, phase)


def overlap(spans: Sequence[Span], start: float, end: float) -> float:
    """How much of [start, end] the spans cover, which are disjoint and in order."""
    total, at = 0.0, max(0, bisect_right(spans, (start, float("inf"))) - 1)
    while at < len(spans) and spans[at][0] < end:
        total += max(0.0, min(end, spans[at][1]) - max(start, spans[at][0]))
        at += 1
    return total


def union(spans: Iterable[Span]) -> list[Span]:
    """The spans as disjoint ones in order."""
    joined: list[Span] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def host_events(events: Iterable[Event]) -> list[Event]:
    """Those of the threads that run the steps and the backward pass, and the allocator's instants there."""
    events = list(events)
    named = [e for e in events if e["ph"] == "X" and e["name"].startswith((PREFIX + "step ", NODE))]
    threads = {(e["pid"], e["tid"]) for e in named}
    kinds = ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver", "cpu_instant_event")
    return [e for e in events if e.get("cat") in kinds and (e["pid"], e["tid"]) in threads]


@dataclass(frozen=True)
class Analysis:
    """A rank's trace in the terms of its record, per step."""

    parts: tuple[Part, ...]
    unattributed_ms: float
    collectives: tuple[Collective, ...]
    host: Host
    syncs: tuple[Sync, ...]
    ops: tuple[Op, ...]
    wall_ms: float
    """Of the steps' ranges."""
    exposed_ms: tuple[float, ...]
    """Of all collectives that began in a step, for each step."""


def analyse(
    events: list[Event], groups: dict[str, int], attention_flops: float = 0.0, places: Sequence[str] = ()
) -> Analysis:
    """groups: the sizes of "tp", "dp" and "world". places: file:line of each wait of one step, in order, if known."""
    sweep = Sweep(attention_flops).run(host_events(events))
    count, kernels = len(sweep.steps), [e for e in events if e.get("cat") in ON_GPU]
    kernels = [e for e in kernels if e["args"].get("correlation") in sweep.launched_in]
    under_way = _gloo(events, sweep, groups) + _nccl(kernels)
    hidden = union((c.start, c.end) for c in under_way if c.on_host and not c.vote)
    for start, end, part, phase in sweep.idle:
        if part != "collectives" and (waited := overlap(hidden, start, end)):
            sweep.times[part, phase] -= waited
            sweep.times["collectives", phase] += waited
    device = defaultdict[str | None, float](float)
    for kernel in kernels:
        nccl = kernel["name"].startswith("nccl")
        device["collectives" if nccl else sweep.launched_in[kernel["args"]["correlation"]]] += kernel["dur"]
    per, seen = 1e-3 / count, {part for (part, _), passed in sweep.times.items() if passed}  # others: another family's
    parts = tuple(
        Part(
            name,
            *(sweep.times[name, phase] * per for phase in PHASES),
            device_ms=device[name] * per,
            flops=sweep.flops[name] / count,
            bytes=sweep.bytes[name] / count,
        )
        for name in PARTS
        if name in seen or name in STEP_PARTS
    )
    ops = [Op(n, p or "none", c / count, ms * per) for (n, p), (c, ms) in sweep.ops.items() if not n.startswith(PREFIX)]
    unattributed = sum(passed for (part, _), passed in sweep.times.items() if part is None)
    wall = sum(end - start for start, end in sweep.steps)
    collectives, exposed = _collectives(under_way, sweep, kernels)
    return Analysis(
        parts, unattributed * per, collectives, _host(sweep, kernels, hidden), _syncs(sweep, places),
        tuple(sorted(ops, key=lambda op: -op.ms)[:20]), wall * per, exposed,
    )  # fmt: skip


@dataclass(frozen=True)
class UnderWay:
    """A collective from its start to its end, on Gloo's threads or a GPU."""

    name: str
    group_size: int
    bytes: float
    start: float
    end: float
    on_host: bool
    vote: bool = False


def _gloo(events: list[Event], sweep: Sweep, groups: dict[str, int]) -> list[UnderWay]:
    """Each is the last call before it with its shapes that is none's yet; its group follows from what called it."""
    found, calls = [], [*sweep.launches]
    for event in sorted((e for e in events if e["ph"] == "X" and e["name"].startswith("gloo:")), key=lambda e: e["ts"]):
        dims, start = event["args"].get("Input Dims", []), event["ts"]
        before = [call for call in calls if call[0] <= start and [*shapes_of(dims)] in call[3]]
        if before:
            calls.remove(before[-1])
            _, called, caller, _ = before[-1]
            vote = caller == PREFIX + "vote"
            size = groups["world" if vote else "tp" if caller.startswith("_c10d") else "dp"]
            name = "reduce_scatter" if "reduce_scatter" in called else event["name"].removeprefix("gloo:")
            name = "vote" if vote else name  # Gloo makes a reduce-scatter of an all-reduce
            moved = bytes_moved("", dims, event["args"].get("Input type", []))
            found.append(UnderWay(name, size, moved, start, start + event["dur"], on_host=True, vote=vote))
    return found


def _nccl(kernels: list[Event]) -> list[UnderWay]:
    found = []
    for event in kernels:
        if event["name"].startswith("nccl"):
            args, start = event["args"], event["ts"]
            moved = args.get("In msg nelems", 0) * NCCL_SIZES.get(args.get("dtype"), 4)
            name, size = args.get("Collective name", event["name"].split("(")[0]), args.get("Group size", 0)
            found.append(UnderWay(name, size, moved, start, start + event["dur"], on_host=False))
    return found


def _collectives(
    under_way: list[UnderWay], sweep: Sweep, kernels: list[Event]
) -> tuple[tuple[Collective, ...], tuple[float, ...]]:
    """What they take in a step by kind, and the exposed time of all of them in each step."""
    idle = union((start, end) for start, end, _, _ in sweep.idle)
    voting = union((start, end) for start, end, part, _ in sweep.idle if part == "collectives")
    busy = union((k["ts"], k["ts"] + k["dur"]) for k in kernels if not k["name"].startswith("nccl"))
    sums: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0.0] * 4)
    exposed = [0.0] * len(sweep.steps)
    for c in under_way:
        length, hidden = c.end - c.start, overlap(busy, c.start, c.end)
        free = overlap(voting if c.vote else idle, c.start, c.end) if c.on_host else length - hidden
        exposed[max(0, bisect_right(sweep.steps, (c.start, float("inf"))) - 1)] += free * 1e-3
        for i, value in enumerate((1.0, length * 1e-3, free * 1e-3, c.bytes)):
            sums[c.name, c.group_size][i] += value
    per_step = [(kind, [value / len(exposed) for value in values]) for kind, values in sorted(sums.items())]
    return tuple(Collective(name, size, *values) for (name, size), values in per_step), tuple(exposed)


def _host(sweep: Sweep, kernels: list[Event], hidden: list[Span]) -> Host:
    count = len(sweep.steps)
    idle = [(start, end) for start, end, part, _ in sweep.idle if part != "collectives"]
    python = sum(end - start - overlap(hidden, start, end) for start, end in idle)
    if not kernels:
        return Host(sweep.calls / count, python * 1e-3 / count, python * 1e-3 / count)
    busy = union((k["ts"], k["ts"] + k["dur"]) for k in kernels)
    gap = sum(end - start - overlap(busy, start, end) for start, end in sweep.steps)
    return Host(len(kernels) / count, gap * 1e-3 / count, python * 1e-3 / count)


def _syncs(sweep: Sweep, places: Sequence[str]) -> tuple[Sync, ...]:
    """By place, where every step waits as often as the one whose places are known; else by part."""
    known = all(len(step) == len(places) for step in sweep.syncs)
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for step in sweep.syncs:
        for i, (part, passed) in enumerate(step):
            where = places[i] if known else part or "none"
            sums[where][0] += 1
            sums[where][1] += passed * 1e-3
    found = [Sync(where, n / len(sweep.steps), ms / len(sweep.steps)) for where, (n, ms) in sums.items()]
    return tuple(sorted(found, key=lambda sync: -sync.ms))
