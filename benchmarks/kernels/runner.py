"""Runs the contests: compares every rival's result on the same tensors, then times the rivals in turns."""

import importlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from benchmarks.clock import Clock, Sample, Thunk, alternate, compare, summary
from benchmarks.kernels.case import FAMILIES, Contest, name_of

OURS, STANDARD = "ingot", "reference"
COMPILED = "torch.compile"  # on a CPU compiling takes longer than everything else together
# Largest norm of the difference over norm of the standard's; fp32's leaves room for TF32.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 2e-3, torch.float64: 1e-6}
WARM_UP = 3  # calls: what is compiled or tuned on the way is not timed

Found = dict[str, Any]  # of a rival: its figures, or "error"; "wrong" if its result is not the standard's
Outcome = dict[str, Any]
T = TypeVar("T")


def benchmark(
    device: torch.device, clock: Clock, only: str = "", families: Sequence[str] = FAMILIES
) -> Iterator[Outcome]:
    """The outcome of each contest in whose "kernel part group shape" `only` is found; tiny shapes on a CPU."""
    small = device.type == "cpu"
    for family in families:
        try:
            for contest in importlib.import_module(f"benchmarks.kernels.{family}").contests(device, small):
                if re.search(only, f"{contest.kernel} {contest.part} {contest.group} {contest.shape}"):
                    yield run_contest(contest, device, clock)
        except Exception as error:  # noqa: BLE001  a family that breaks must not cost the others their figures
            yield outcome(Contest(family, "", "", "", 0, torch.float32, 0.0, {}), {OURS: {"error": reason(error)}})


def run_contest(contest: Contest, device: torch.device, clock: Clock) -> Outcome:
    """Set up, compare and time every rival of a contest."""
    found: dict[str, Found] = {name: {} for name in contest.rivals}
    # By default a compiled backward pass refuses to run twice on one graph. The setting is a thread's own, so autograd
    # has to stay in this one.
    with functorch_config.patch(donated_buffer=False), torch.autograd.set_multithreading_enabled(False):
        thunks = prepare(contest, device, found)
        samples: dict[str, list[Sample]] = {name: [] for name in thunks}
        for name in alternate(list(thunks), clock.rounds):
            if "error" not in found[name]:
                samples[name] += attempt(found[name], partial(clock.turn, thunks[name])) or []
    for name, calls in samples.items():
        if "error" not in found[name]:
            found[name] |= summary(calls)
    if device.type == "cuda":
        thunks.clear()
        torch.compiler.reset()  # else the ninth shape of a function runs eagerly
        torch.cuda.empty_cache()
    return outcome(contest, found)


def prepare(contest: Contest, device: torch.device, found: Mapping[str, Found]) -> dict[str, Thunk]:
    """The thunks of the rivals that run; what is wrong with a rival is noted in `found`.

    Results are compared with the reference's, or with ours where there is none.
    """
    thunks: dict[str, Thunk] = {}
    standard: list[Tensor] = []
    ours: list[Tensor] = []

    def admit(name: str) -> None:
        nonlocal standard, ours
        thunk = contest.rivals[name]()
        outputs = floats(thunk())
        for _ in range(WARM_UP - 1):
            thunk()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        tolerance = TOLERANCE[contest.dtype]
        if name not in contest.unlike:
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
    for name in sorted(contest.rivals, key=lambda name: (name != OURS, name != STANDARD)):
        if device.type == "cpu" and name.startswith(COMPILED):
            found[name]["error"] = "not timed on a CPU"
        else:
            attempt(found[name], partial(admit, name))
    return thunks


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


def outcome(contest: Contest, found: Mapping[str, Found]) -> Outcome:
    """What is recorded: the contest, each rival's figures, and how ours stands to the best other."""
    for record in found.values():
        if "ms" in record:
            record["gb_s"] = contest.bytes / 1e9 / record["ms"] * 1e3
            record["tflop_s"] = contest.flops / 1e12 / record["ms"] * 1e3
    right = {name: record["ms"] for name, record in found.items() if "ms" in record and "wrong" not in record}
    best = min((name for name in right if not name.startswith(OURS)), key=lambda name: right[name], default=None)
    ratio = right[best] / found[OURS]["ms"] if best and "ms" in found[OURS] else None
    fields = {name: value for name, value in vars(contest).items() if name != "unlike"}
    return fields | {"dtype": name_of(contest.dtype), "rivals": dict(found), "best_other": best, "ratio": ratio}


def ours_failed(result: Outcome) -> bool:
    """Whether a kernel of ours did not run, or gave another result than the reference."""
    return bool(failures_of(result))


def failures_of(result: Outcome) -> list[str]:
    """What is wrong with each of ours."""
    found = {name: record for name, record in result["rivals"].items() if name.startswith(OURS)}
    return [f"{name}: {record}" for name, record in found.items() if {"error", "wrong"} & record.keys()]


def limits_of(device: torch.device, clock: Clock) -> dict[str, float]:
    """GB/s of a copy, bytes read plus bytes written, and TFLOP/s of a square matrix product, on random data."""
    size, dtype, copied = 512, torch.float32, 2**26
    if device.type == "cuda":
        size, dtype, copied = 8192, torch.bfloat16, 2**30
    source = torch.randint(0, 100, (copied,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    thunks = {"copy": lambda: target.copy_(source), "matmul": lambda: torch.mm(a, b, out=product)}
    ms = {name: summary(samples)["ms"] for name, samples in compare(clock, thunks, rounds=5).items()}
    return {"copy_gb_s": 2 * copied / ms["copy"] / 1e6, "matmul_tflop_s": 2 * size**3 / ms["matmul"] / 1e9}
