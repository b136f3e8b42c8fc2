"""Which cases run where: a few of each list in `make test`, all in `make test-all`, in CI what the commit chooses."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from itertools import combinations
from typing import Any

import pytest
from _pytest.mark.expression import Expression


def is_chosen(test: str, chosen_by: str, one_in: int) -> bool:
    """Whether a test is among the one in `one_in` that the text `chosen_by` chooses."""
    digest = hashlib.sha256(f"{chosen_by} {test}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % one_in == 0


def selects_only_gpu(expression: str) -> bool:
    """Whether a marker expression (`-m`) selects tests marked `gpu`, and none without that mark."""
    if not expression.strip():
        return False
    compiled = Expression.compile(expression)
    others = [set(marks) for n in range(4) for marks in combinations(("slow", "ranks", "cluster"), n)]
    without, among = (
        any(compiled.evaluate(lambda name, marks=marks | extra, **_: name in marks) for marks in others)
        for extra in (set(), {"gpu"})
    )
    return among and not without


def slow_but(fast: Collection[Any], cases: Iterable[Any], *, several: bool = False) -> list[Any]:
    """The cases as parameters of a test, all marked `slow` but those in `fast`; several: each is a tuple of them."""
    cases = list(cases)
    assert all(case in cases for case in fast)
    return [
        case if case in fast else pytest.param(*(case if several else (case,)), marks=pytest.mark.slow)
        for case in cases
    ]
