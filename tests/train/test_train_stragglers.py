"""A slow rank is named with its phase, once; ranks that are alike, or differ in a trifle, are not."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from llm.train.stragglers import MIN_STEPS, PHASES, Stopwatch, Stragglers
from pool import RankPool


def windows(*slow: dict[str, float], gpu: dict[str, float] | None = None) -> tuple[list[Any], list[str]]:
    """For each window, rank 1's times (s) where they are not those of rank 0: the records, and what was said.

    gpu: the state of rank 1's; that of rank 0 is not known.
    """
    state = (gpu or {}) if dist.get_rank() == 1 else {}
    said, group = [], dist.new_group(backend="gloo")
    stragglers = Stragglers(group, ["a", "b"], said.append)
    records = []
    for number, changes in enumerate(slow, start=1):
        usual = {"load": 0.01, "forward": 0.1, "update": 0.001}
        mine = usual | (changes if dist.get_rank() == 1 else {})
        for i in range(MIN_STEPS):
            assert stragglers.report(i, 0.3, state) == {}
            # A step in ten takes longer by far: the median does not see it.
            stragglers.step(*(seconds * (50 if i == dist.get_rank() else 1) for seconds in mine.values()))
        records.append(stragglers.report(10 * number, 0.3, state))
    dist.destroy_process_group(group)
    return records, said


def test_the_slow_rank_and_its_phase(two_ranks: RankPool) -> None:
    slow, load = {"forward": 0.5}, {"load": 0.2}
    (records, said), (others, _) = two_ranks.run(windows, {}, slow, slow, slow, {}, slow, slow, load, load)
    assert records == others
    assert said == [
        "warning: step 30: rank 1 on b is slow: forward takes 0.5 s, 5.0 x the median",
        "warning: step 70: rank 1 on b is slow: forward takes 0.5 s, 5.0 x the median",
        "warning: step 90: rank 1 on b is slow: load takes 0.2 s, 20.0 x the median",
    ]
    slowest, fastest = records[1]["slowest"], records[1]["fastest"]
    assert slowest["forward_rank"] == 1 and slowest["forward_factor"] == pytest.approx(5)
    assert fastest["forward_rank"] == 0 and fastest["forward_factor"] == 1  # the lower of two is the median
    keys = {f"{phase}_{what}" for phase in PHASES for what in ("rank", "factor")}
    assert records[0].keys() == {"slowest", "fastest"} and all(found.keys() == keys for found in records[0].values())


def fastest_of_four() -> dict[str, float]:
    """Of ranks that take 4, 3, 2 and 1 s for a forward pass."""
    stragglers = Stragglers(dist.new_group(backend="gloo"), ["a", "b", "c", "d"], print)
    for _ in range(MIN_STEPS):
        stragglers.step(0.1, 4.0 - dist.get_rank(), 0.1)
    return stragglers.report(1, 6.0, {})["fastest"]


def test_the_fastest_rank(four_ranks: RankPool) -> None:
    for found in four_ranks.run(fastest_of_four):
        assert (found["forward_rank"], found["forward_factor"]) == (3, pytest.approx(0.5))


@pytest.mark.parametrize(
    ("gpu", "why"),
    [
        (
            {"clock_mhz": 345, "throttle_reasons": 0x41},
            "; its GPU's clock is at 345 MHz, throttled by hardware thermal",
        ),
        ({"clock_mhz": 1980, "throttle_reasons": 0}, "; its GPU's clock is at 1980 MHz"),
        ({}, ""),
    ],
)
def test_a_slow_rank_comes_with_the_state_of_its_gpu(two_ranks: RankPool, gpu: dict[str, float], why: str) -> None:
    slow = {"forward": 0.5}
    (_, said), _ = two_ranks.run(partial(windows, slow, slow, gpu=gpu))
    assert said == [f"warning: step 20: rank 1 on b is slow: forward takes 0.5 s, 5.0 x the median{why}"]


@pytest.mark.parametrize("change", [{"update": 0.01}, {"forward": 0.14}, {"forward": 0.08, "load": 0.001}])
def test_a_trifle_is_not_named(two_ranks: RankPool, change: dict[str, float]) -> None:
    assert [said for _, said in two_ranks.run(windows, change, change)] == [[], []]


def test_a_slow_spell_is_not_named(two_ranks: RankPool) -> None:
    slow = {"forward": 0.5}
    assert [said for _, said in two_ranks.run(windows, slow, {}, slow, {"load": 0.2}, {})] == [[], []]


def test_a_process_alone_compares_nothing() -> None:
    stragglers: Any = Stragglers(None, (), print)
    for _ in range(20):
        stragglers.step(1.0, 1.0, 1.0)
    assert stragglers.report(20, 3.0, {}) == {} and stragglers.steps == []


def test_the_stopwatch_adds_up_its_blocks_alone() -> None:
    watch, start = Stopwatch(torch.device("cpu")), time.perf_counter()
    for _ in range(2):
        with watch:
            time.sleep(0.02)
        time.sleep(0.02)
    assert 0.04 <= watch.take()() <= time.perf_counter() - start - 0.04
    assert watch.count == 2
    assert watch.take()() == 0
