"""Vector clocks, and the races that they find.

A clock says how much of what each party did is known to be over: of a partition its steps, of a copy 1 once it has
landed, of a barrier its phases. Of two overlapping accesses, one of them a write, whoever makes the second must know
that the first is over. So a race is found even if the schedule at hand happened to run the two in the right order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Clock(dict):
    """What one party knows; missing parties stand at 0."""

    def __missing__(self, party: Any) -> int:
        return 0

    def join(self, other: Clock) -> None:
        for party, time in other.items():
            if time > self[party]:
                self[party] = time

    def copy(self) -> Clock:
        return Clock(self)


class Moment(NamedTuple):
    """The end of an access, on the clock of the party that knows it first."""

    party: Any
    time: int


class Access:
    """A read or write of a part of shared memory."""

    __slots__ = ("end", "party", "unfenced", "view", "what", "write")

    def __init__(self, view: np.ndarray, what: str, party: Any, write: bool, generic: bool, end: Moment | None) -> None:
        self.view, self.what, self.party, self.write = view, what, party, write
        self.end = end
        """None: not over yet, as far as anyone knows."""
        self.unfenced = write and generic
        """Whether asynchronous readers may still see the old bytes."""

    def known_to(self, clock: Clock) -> bool:
        return self.end is not None and clock[self.end.party] >= self.end.time


def overlap(a: np.ndarray, b: np.ndarray) -> bool:
    return np.may_share_memory(a, b) and np.shares_memory(a, b)


def covers(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether `a` certainly holds all elements of `b`: both are the same view, or `a` is in one piece around it."""
    (low, high), (start, end) = np.lib.array_utils.byte_bounds(a), np.lib.array_utils.byte_bounds(b)
    return low <= start and end <= high and (high - low == a.nbytes or (a.strides == b.strides and a.shape == b.shape))


class Log:
    """The accesses to one allocation that a later one could still collide with."""

    def __init__(self) -> None:
        self.accesses: list[Access] = []

    def add(self, new: Access, clock: Clock, generic: bool, report: Callable[[str, str], None]) -> None:
        """Record an access that starts with what `clock` knows; report the races and missing fences that it makes."""
        kept = []
        for old in self.accesses:
            both = overlap(old.view, new.view)
            known = old.known_to(clock)
            if both and (old.write or new.write) and not known:
                report("race", f"{new.what} is not ordered after {old.what}")
            if both and old.unfenced and not generic:
                report("fence", f"{new.what} comes without fence_async_shared after {old.what}")
            # Whoever is ordered after the new access is ordered after what it followed.
            replaced = (
                known and covers(new.view, old.view) and (new.write or (not old.write and old.party == new.party))
            )
            if not (both and replaced):
                kept.append(old)
        self.accesses = [*kept, new]
