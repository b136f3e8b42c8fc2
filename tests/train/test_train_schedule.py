"""The learning rate against the closed forms of its schedules."""

from __future__ import annotations

import itertools
import math

import pytest

from llm.config import OptimConfig
from llm.train.schedule import learning_rate

COSINE = OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=10, schedule="cosine")
WSD = OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=10, schedule="wsd", decay_fraction=0.2)


def rates(config: OptimConfig, max_steps: int) -> list[float]:
    return [learning_rate(config, step, max_steps) for step in range(max_steps)]


@pytest.mark.parametrize("config", [COSINE, WSD])
def test_warm_up_rises_in_equal_parts_to_the_peak(config: OptimConfig) -> None:
    assert rates(config, 100)[:10] == pytest.approx([1e-2 * (i + 1) / 10 for i in range(10)])


@pytest.mark.parametrize("config", [COSINE, WSD])
def test_the_last_update_and_all_beyond_have_min_lr(config: OptimConfig) -> None:
    assert learning_rate(config, 99, 100) == pytest.approx(1e-3, rel=1e-12)
    assert learning_rate(config, 500, 100) == 1e-3
    assert learning_rate(config, 98, 100) > 1e-3


def test_cosine_by_its_formula() -> None:
    for done, rate in enumerate(rates(COSINE, 100), 1):
        if done > 10:
            cosine = (1 + math.cos(math.pi * (done - 10) / 90)) / 2
            assert rate == pytest.approx(1e-3 + 9e-3 * cosine)
    assert learning_rate(COSINE, 54, 100) == pytest.approx((1e-2 + 1e-3) / 2)  # half way


def test_wsd_is_stable_then_falls_in_equal_parts() -> None:
    found = rates(WSD, 100)
    assert found[10:80] == [1e-2] * 70
    falls = [a - b for a, b in itertools.pairwise(found[79:])]
    assert falls == pytest.approx([9e-3 / 20] * 20)


def test_no_warm_up_and_warm_ups_as_long_as_the_run() -> None:
    no_warmup = OptimConfig(lr=1.0, min_lr=0.0, warmup_steps=0)
    assert learning_rate(no_warmup, 0, 1) == 0.0
    assert learning_rate(no_warmup, 0, 1000) == pytest.approx(1.0, abs=1e-5)
    assert rates(COSINE, 4) == pytest.approx([1e-3, 2e-3, 3e-3, 4e-3])  # cut off by the end
    assert rates(COSINE, 10)[-1] == 1e-2


def test_a_long_decay_waits_for_the_warm_up() -> None:
    config = OptimConfig(lr=1.0, min_lr=0.0, warmup_steps=50, schedule="wsd", decay_fraction=0.9)
    found = rates(config, 100)
    assert max(found) == found[49] == 1.0
    assert found[74] == pytest.approx(0.5)
