"""Who goes on next: at random, with partitions and operations that are much slower than others, or by assumed times."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any


class Random:
    """Each partition and operation has a weight, drawn anew: some are a hundred times slower than others.

    A weight of 0: it happens only once nothing else can.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def agent_weight(self) -> float:
        return 0 if self.random.random() < 0.15 else 10 ** self.random.uniform(-1.5, 1.5)

    def operation_weight(self) -> float:
        kind = self.random.random()
        return 0 if kind < 0.3 else 1e3 if kind < 0.5 else 10 ** self.random.uniform(-2, 1)

    def flip(self) -> bool:
        """A choice between two orders."""
        return self.random.random() < 0.5

    def choose(self, moves: Sequence[Any]) -> Any:
        if len(moves) == 1:
            return moves[0]
        weights = [move.weight for move in moves]
        return self.random.choices(moves, weights)[0] if any(weights) else self.random.choice(moves)


class Timed:
    """Whoever is earliest by assumed times goes on: no chance in it."""

    def agent_weight(self) -> float:
        return 1

    operation_weight = agent_weight

    def flip(self) -> bool:
        return False

    def choose(self, moves: Sequence[Any]) -> Any:
        return min(moves, key=lambda move: move.time)
