"""The soak's schedule comes again from its seed, and its comparison sees what differs."""

from __future__ import annotations

from itertools import pairwise

import soak

KINDS = ("kill one", "kill all", "truncate", "preempt", "stall")


def test_a_seed_gives_its_schedule() -> None:
    assert soak.schedule(7, 9, 900, KINDS) == soak.schedule(7, 9, 900, KINDS) != soak.schedule(8, 9, 900, KINDS)
    for seed in range(40):
        first, faults = soak.schedule(seed, 9, 900, KINDS)
        steps = [fault.step for fault in faults]
        assert steps == sorted(steps) and steps[0] > 2 * soak.INTERVAL and steps[-1] < 900 - soak.INTERVAL
        assert min(later - earlier for earlier, later in pairwise(steps)) > 2 * soak.INTERVAL
        layouts = [first, *(fault.layout for fault in faults)]
        assert {fault.kind for fault in faults[:5]} | {"kill all", "stall"} == set(KINDS)
        assert not [
            0 for fault, layout in zip(faults, layouts, strict=False) if fault.kind == "stall" and layout == "python"
        ]
        assert seed % 4 or set(layouts) == {first}


def test_differences_are_seen() -> None:
    whole = {1: 4.0, 2: 3.0, 3: 2.0}
    assert soak.differences(dict(whole), whole, 3) == []
    assert soak.differences({1: 4.0, 2: 3.0, 3: 2.00001}, whole, 2) == []
    assert soak.differences({1: 4.0, 2: 3.0, 3: 2.00001}, whole, 3) == ["step 3: 2.00001, not 2.0"]
    assert soak.differences({1: 4.0, 2: 3.0, 3: 2.0001}, whole, 2) == ["step 3: 2.0001, not 2.0"]
    assert soak.differences({1: 4.0, 2: 3.0, 3: float("nan")}, whole, 0) == ["step 3: nan, not 2.0"]
    assert soak.differences({1: 4.0, 2: 3.0}, whole, 3) == ["steps [3]"]
