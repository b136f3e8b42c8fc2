"""A slow rank is named with its phase, once; ranks that are alike, or differ in a trifle, are not."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from llm.train.stragglers import MIN_STEPS, PHASES, Stopwatch, Stragglers
from pool import RankPool


def windows(*slow: dict[str, float]) -> tuple[list[dict[str, float]], list[str]]:
    """For each window, rank 1's times (s) where they are not those of rank 0: the records, and what was said."""
    said, group = [], dist.new_group(backend="gloo")
    stragglers = Stragglers(group, ["a", "b"], said.append)
    records = []
    for number, changes in enumerate(slow, start=1):
        usual = {"load": 0.01, "forward": 0.1, "update": 0.001}
        mine = usual | (changes if dist.get_rank() == 1 else {})
        for i in range(MIN_STEPS):
            assert stragglers.report(i, 0.3) == {}
            # A step in ten takes longer by far: the median does not see it.
            stragglers.step(*(seconds * (50 if i == dist.get_rank() else 1) for seconds in mine.values()))
        records.append(stragglers.report(10 * number, 0.3))
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
    assert records[1]["forward_rank"] == 1 and records[1]["forward_factor"] == pytest.approx(5)
    assert set(records[0]) == {f"{phase}_{what}" for phase in PHASES for what in ("rank", "factor")}


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
    assert stragglers.report(20, 3.0) == {} and stragglers.steps == []


def test_the_stopwatch_adds_up_its_blocks_alone() -> None:
    watch, start = Stopwatch(torch.device("cpu")), time.perf_counter()
    for _ in range(2):
        with watch:
            time.sleep(0.02)
        time.sleep(0.02)
    assert 0.04 <= watch.take()() <= time.perf_counter() - start - 0.04
    assert watch.count == 2
    assert watch.take()() == 0
