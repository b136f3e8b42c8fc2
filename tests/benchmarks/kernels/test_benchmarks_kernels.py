"""The kernel benchmark compares, times and judges rivals; here with a clock and rivals made up."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

import benchmarks.kernels
from benchmarks.clock import CpuClock, Sample, Thunk
from benchmarks.kernels import runner
from benchmarks.kernels.case import FAMILIES, Contest, Setup
from benchmarks.kernels.runner import benchmark, comparison, limits_of, ours_failed, run_contest

CPU = torch.device("cpu")
ONES = torch.ones(4)


@dataclass
class Rival:
    """Takes `seconds` on the fake clock."""

    seconds: float
    result: torch.Tensor | None

    def __call__(self) -> torch.Tensor | None:
        return self.result


class FakeClock:
    """`turns`: the seconds of the rivals in the order in which they had a turn."""

    rounds, method = 3, "make-believe"

    def __init__(self) -> None:
        self.turns: list[float] = []

    def turn(self, thunk: Thunk) -> list[Sample]:
        thunk()
        seconds = getattr(thunk, "seconds", 1.0)
        self.turns.append(seconds)
        return [Sample(seconds, seconds / 10)]


def rival(seconds: float, result: torch.Tensor | None = ONES) -> Setup:
    return lambda: Rival(seconds, result)


def raising(error: Exception) -> Setup:
    def setup() -> Thunk:
        raise error

    return setup


def contest(rivals: dict[str, Setup], **fields) -> Contest:
    values = {"flops": 8e12, "bytes": 4e9, "dtype": torch.float32} | fields
    return Contest(kernel="k", part="forward", shape="N=4", axis="N", width=4, rivals=rivals, **values)


def judged(rivals: dict[str, Setup], **fields) -> dict:
    return run_contest(contest(rivals, **fields), CPU, FakeClock())


def test_the_ratio_is_to_the_best_other() -> None:
    result = judged({"ingot": rival(2.0), "ingot, atomics": rival(0.5), "slow": rival(6.0), "fast": rival(3.0)})
    assert (result["best_other"], result["ratio"]) == ("fast", 1.5)
    ours = result["rivals"]["ingot"]
    assert (ours["ms"], ours["host_ms"], ours["gb_s"], ours["tflop_s"]) == (2000, 200, 2.0, 4.0)
    assert not ours_failed(result)


def test_rivals_are_timed_in_turns() -> None:
    clock = FakeClock()
    run_contest(contest({"ingot": rival(1.0), "other": rival(2.0)}), CPU, clock)
    assert clock.turns == [1, 2, 2, 1, 1, 2]


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (ModuleNotFoundError("No module named 'quack'"), "not installed: No module named 'quack'"),
        (AssertionError(), "AssertionError: "),
        (RuntimeError("CUDA error: x\nmore"), "RuntimeError: CUDA error: x"),
    ],
)
def test_a_rival_that_cannot_run_is_named(error: Exception, found: str) -> None:
    result = judged({"ingot": rival(1.0), "other": raising(error)})
    assert result["rivals"]["other"] == {"error": found}
    assert result["ratio"] is None
    assert not ours_failed(result)


def test_a_rival_may_fail_while_it_is_timed() -> None:
    calls = iter([ONES] * runner.WARM_UP)
    result = judged({"ingot": rival(1.0), "other": lambda: lambda: next(calls)})
    assert result["rivals"]["other"]["error"].startswith("StopIteration")


def test_ours_failing_is_a_failure() -> None:
    assert ours_failed(judged({"ingot": raising(ValueError("no")), "other": rival(1.0)}))


def test_a_wrong_rival_does_not_count() -> None:
    result = judged({"ingot": rival(2.0), "wrong": rival(1.0, ONES * 1.01), "right": rival(8.0, ONES * 1.001)})
    assert "differs by 1.0e-02 of its norm" in result["rivals"]["wrong"]["wrong"]
    assert result["rivals"]["wrong"]["ms"] == 1000
    assert (result["best_other"], result["ratio"]) == ("right", 4.0)


@pytest.mark.parametrize("bad", [ONES * 1.01, ONES * torch.nan])
def test_ours_is_judged_by_the_reference(bad: torch.Tensor) -> None:
    result = judged({"other": rival(1.0), "ingot": rival(2.0, bad), "reference": rival(3.0)})
    assert "wrong" in result["rivals"]["ingot"]
    assert "wrong" not in result["rivals"]["other"]
    assert ours_failed(result)


def test_each_tensor_of_a_result_counts() -> None:
    assert comparison([ONES, ONES * 1.001], [ONES, ONES], 1e-2) == {"difference": pytest.approx(1e-3, rel=1e-3)}
    for bad in (ONES * 1.1, ONES * torch.nan):
        assert "wrong" in comparison([ONES, bad], [ONES, ONES], 1e-2)
        assert "wrong" in comparison([bad, ONES], [ONES, ONES], 1e-2)
    assert "wrong" in comparison([ONES], [ONES, ONES], 1e-2)


def test_a_result_of_other_shapes_is_wrong() -> None:
    result = judged({"ingot": rival(1.0), "view": rival(1.0, ONES.view(2, 2)), "shape": rival(1.0, torch.ones(5))})
    assert result["rivals"]["shape"]["wrong"] == "the result has shapes [(5,)], expected [(4,)]"
    assert "wrong" not in result["rivals"]["view"]


def test_unlike_and_silent_rivals_are_not_compared() -> None:
    rivals = {"ingot": rival(1.0), "silent": rival(1.0, None), "random": rival(1.0, torch.zeros(4))}
    result = judged(rivals, unlike=frozenset({"random"}))
    assert not any("wrong" in record for record in result["rivals"].values())


def test_a_rival_that_changes_the_shared_tensors_is_found() -> None:
    shared = torch.ones(4)

    def doubles() -> Thunk:
        return lambda: shared.mul_(2)

    result = judged({"ingot": lambda: Rival(1.0, shared * 1), "a": rival(1.0), "b": rival(1.0)})
    assert not any("wrong" in record for record in result["rivals"].values())
    result = judged({"ingot": lambda: lambda: shared * 1, "a": rival(1.0), "b": doubles, "c": rival(1.0)})
    assert [name for name, record in result["rivals"].items() if "changes" in record.get("wrong", "")] == ["b"]


def test_compiling_is_left_out_on_a_cpu() -> None:
    result = judged({"ingot": rival(1.0), "torch.compile": raising(AssertionError("compiled"))})
    assert result["rivals"]["torch.compile"]["error"] == "not timed on a CPU"


def test_a_family_that_breaks_costs_only_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def contests(device: torch.device, small: bool) -> Iterator[Contest]:
        yield contest({"ingot": rival(1.0)})
        raise RuntimeError("out of something")

    def good(device: torch.device, small: bool) -> Iterator[Contest]:
        assert small
        yield contest({"ingot": rival(1.0)}, group="this")
        yield contest({"ingot": rival(1.0)}, group="that")

    modules: dict[str, Callable] = {"benchmarks.kernels.broken": contests, "benchmarks.kernels.good": good}
    monkeypatch.setattr(runner.importlib, "import_module", lambda name: SimpleNamespace(contests=modules[name]))
    results = list(benchmark(CPU, FakeClock(), families=["broken", "good"]))
    assert [ours_failed(r) for r in results] == [False, True, False, False]
    assert results[1]["rivals"]["ingot"]["error"] == "RuntimeError: out of something"
    assert [r["group"] for r in benchmark(CPU, FakeClock(), "k forward this", ["good"])] == ["this"]


def test_every_module_with_cases_is_a_family() -> None:
    names = [module.name for module in pkgutil.iter_modules(benchmarks.kernels.__path__)]
    for function in ("compiled", "contests"):
        assert {name for name in names if hasattr(import_module(f"benchmarks.kernels.{name}"), function)} == set(
            FAMILIES
        )


def test_the_machine_is_measured() -> None:
    assert all(value > 0 for value in limits_of(CPU, CpuClock()).values())
