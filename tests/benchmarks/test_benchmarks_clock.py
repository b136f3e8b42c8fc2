"""The benchmarks' clock takes turns, summarises, and describes the machine."""

from __future__ import annotations

import os
import time
from collections import Counter
from importlib.metadata import version

import pytest
import torch

from benchmarks.clock import CpuClock, Sample, alternate, clock_of, compare, machine, summary

CPU = torch.device("cpu")


def test_none_is_always_first() -> None:
    assert "".join(alternate("abc", 4)) == "abcbcacababc"
    assert list(alternate([], 3)) == []


def test_candidates_are_warmed_up_then_timed_in_turns() -> None:
    calls: list[str] = []
    samples = compare(CpuClock(), {name: lambda name=name: calls.append(name) for name in "ab"}, rounds=3)
    assert "".join(calls) == "aabb" + "aabb" + "bbaa" + "aabb"
    assert {name: len(found) for name, found in samples.items()} == Counter("aaaaaabbbbbb")


def test_the_cpu_clock_times_the_call() -> None:
    for sample in clock_of(CPU).turn(lambda: time.sleep(0.01)):
        assert 0.01 <= sample.device == sample.host < 1


def test_quantiles_interpolate() -> None:
    samples = [Sample(s / 1e3, 1e-3) for s in (5, 1, 4, 2, 3, 6)]
    assert summary(samples) == pytest.approx({"ms": 3.5, "ms_p20": 2, "ms_p80": 5, "host_ms": 1, "calls": 6})


def test_the_machine_is_described() -> None:
    found = machine(CPU, ["torch", "no-such-package"])
    assert found["packages"] == {"torch": version("torch")}
    assert found["cores"] == os.cpu_count() and found["memory_gb"] >= 1 and found["cpu"]
    assert found["gpu"] is None and found["load"] >= 0


@pytest.mark.gpu
@pytest.mark.parametrize("cold", [False, True])
def test_the_gpu_clock_times_the_device(cold: bool) -> None:
    """A product of 4096 x 4096 matrices takes the device longer than the host, the host's part is little."""
    a = torch.randn(4096, 4096, device="cuda")
    samples = compare(clock_of(a.device, cold=cold), {"mm": lambda: a @ a}, rounds=3)["mm"]
    assert all(sample.host > 0 and 1e-4 < sample.device < 1 for sample in samples)
