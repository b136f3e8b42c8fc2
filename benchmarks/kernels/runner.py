"""Runs the cases: every rival on the same tensors, in turns, compared before it is timed."""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from benchmarks.kernels.case import BenchCase, Setup, Thunk
from benchmarks.kernels.measure import Clock, Sample, summary

# Modules of this package with `cases(device, small)`.
FAMILIES = ("attention", "cross_entropy", "dropout", "adamw", "embedding", "gelu", "rope", "swiglu", "norm")
OURS, STANDARD = "ingot", "reference"
COMPILED = "torch.compile"  # on a CPU compiling takes longer than everything else together
# Largest norm of the difference over norm of the standard's; fp32's leaves room for TF32.
TOLERANCE = {"bfloat16": 2e-2, "float16": 5e-3, "float32": 2e-3, "float64": 1e-6}
WARM_UP = 3  # calls: what is compiled or tuned on the way is not timed

Found = dict[str, Any]  # of a rival: its figures, or "error"; "wrong" if its result is not the standard's
Outcome = dict[str, Any]
T = TypeVar("T")


def benchmark(
    device: torch.device, clock: Clock, only: str = "", families: Sequence[str] = FAMILIES
) -> Iterator[Outcome]:
    """The outcome of each case whose "kernel part group shape" `only` is found in; tiny shapes on a CPU."""
    small = device.type == "cpu"
    for family in families:
        try:
            for case in importlib.import_module(f"benchmarks.kernels.{family}").cases(device, small):
                if re.search(only, f"{case.kernel} {case.part} {case.group} {case.shape}"):
                    yield run_case(case, device, clock)
        except Exception as error:  # noqa: BLE001  a family that breaks must not cost the others their figures
            yield outcome(BenchCase(family, "", "", "", 0, "", 0.0, 0.0, {}), {OURS: {"error": reason(error)}})


def run_case(case: BenchCase, device: torch.device, clock: Clock) -> Outcome:
    """Set up, compare and time every rival of a case."""
    found: dict[str, Found] = {name: {} for name in case.rivals}
    # By default a compiled backward pass refuses to run twice on one graph. The setting is a thread's own, so autograd
    # has to stay in this one.
    with functorch_config.patch(donated_buffer=False), torch.autograd.set_multithreading_enabled(False):
        thunks = prepare(case, device, found)
        samples: dict[str, list[Sample]] = {name: [] for name in thunks}
        for _ in range(clock.rounds):  # in turns, so that a slow spell of the machine hits each rival
            for name in [name for name in thunks if "error" not in found[name]]:
                samples[name] += attempt(found[name], partial(clock.turn, thunks[name])) or []
    for name, calls in samples.items():
        if "error" not in found[name]:
            found[name] |= summary(calls)
    if device.type == "cuda":
        thunks.clear()
        torch.compiler.reset()  # else the ninth shape of a function runs eagerly
        torch.cuda.empty_cache()
    return outcome(case, found)


def prepare(case: BenchCase, device: torch.device, found: Mapping[str, Found]) -> dict[str, Thunk]:
    """The thunks of the rivals that run; what is wrong with a rival is noted in `found`.

    Results are compared with the reference's, or with ours where there is none.
    """
    thunks: dict[str, Thunk] = {}
    standard: list[Tensor] = []
    ours: list[Tensor] = []

    def admit(name: str) -> None:
        nonlocal standard, ours
        thunk, outputs = first_call(case.rivals[name], device)
        tolerance = TOLERANCE[case.dtype]
        if name not in case.unlike:
            judged = found[OURS if name == STANDARD else name]
            judged |= comparison(outputs, standard, tolerance)
            standard = outputs if name in (OURS, STANDARD) else standard
        if name == OURS:
            ours = outputs
        elif OURS in thunks and "wrong" not in found[OURS]:
            before, ours = ours, floats(thunks[OURS]())
            if "wrong" in comparison(ours, before, tolerance):
                found[name]["wrong"] = "it changes the tensors that the rivals share"
        thunks[name] = thunk

    # Ours first: if memory runs out, it is a rival that goes without.
    for name in sorted(case.rivals, key=lambda name: (name != OURS, name != STANDARD)):
        if device.type == "cpu" and name.startswith(COMPILED):
            found[name]["error"] = "not timed on a CPU"
        else:
            attempt(found[name], partial(admit, name))
    return thunks


def first_call(setup: Setup, device: torch.device) -> tuple[Thunk, list[Tensor]]:
    """The warmed-up thunk, and the floating-point tensors of its first result."""
    thunk = setup()
    result = thunk()
    for _ in range(WARM_UP - 1):
        thunk()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return thunk, floats(result)


def floats(result: object) -> list[Tensor]:
    """The floating-point tensors of a thunk's result."""
    results = result if isinstance(result, tuple | list) else [result]
    return [t.detach() for t in results if isinstance(t, Tensor) and t.is_floating_point()]


def comparison(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float) -> Found:
    """The largest norm of a difference over the norm of the second; nothing if one side returned nothing."""
    if not ours or not theirs:
        return {}
    if [t.numel() for t in ours] != [t.numel() for t in theirs]:
        found, expected = ([tuple(t.shape) for t in side] for side in (ours, theirs))
        return {"wrong": f"the result has shapes {found}, expected {expected}"}
    pairs = zip(ours, theirs, strict=True)
    apart = [float(norm(a.reshape(b.shape) - b) / norm(b).clamp_min(1e-30)) for a, b in pairs]
    worst = max(apart, key=lambda x: (x != x, x))  # NaN is the worst
    if worst <= tolerance:
        return {"difference": worst}
    return {"wrong": f"the result differs by {worst:.1e} of its norm, expected at most {tolerance:.0e}"}


def norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32))


def attempt(record: Found, action: Callable[[], T]) -> T | None:
    """What `action` returns, or None after noting in `record` why it failed."""
    try:
        return action()
    except Exception as error:  # noqa: BLE001  rivals are foreign code: whatever they raise is their result
        record["error"] = reason(error)
        return None


def reason(error: Exception) -> str:
    first_line = (str(error).strip().splitlines() or [""])[0][:200]
    return f"{'not installed' if isinstance(error, ImportError) else type(error).__name__}: {first_line}"


def outcome(case: BenchCase, found: Mapping[str, Found]) -> Outcome:
    """What goes into the JSON: the case, each rival's figures, and how ours stands to the best other."""
    for record in found.values():
        if "ms" in record:
            record["gb_s"], record["tflop_s"] = (x / record["ms"] * 1e3 for x in (case.bytes / 1e9, case.flops / 1e12))
    others = {
        name: record["ms"]
        for name, record in found.items()
        if "ms" in record and "wrong" not in record and not name.startswith(OURS)
    }
    best = min(others, key=lambda name: others[name], default=None)
    ratio = others[best] / found[OURS]["ms"] if best and "ms" in found[OURS] else None
    fields = {f.name: getattr(case, f.name) for f in dataclasses.fields(case) if f.name not in ("rivals", "unlike")}
    return fields | {"rivals": dict(found), "best_other": best, "ratio": ratio}


def ours_failed(result: Outcome) -> bool:
    """Whether our kernel did not run, or gave another result than the reference."""
    return bool({"error", "wrong"} & result["rivals"][OURS].keys())
