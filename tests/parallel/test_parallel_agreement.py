"""Ranks that wait for the first one wait longer than for one another."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from llm.errors import Agreed, InputError
from llm.parallel.agreement import lead_first, together
from pool import TIMEOUT_SECONDS, RankPool


def waited(seconds: float) -> int:
    """How many ranks did the work, which takes longer than collectives of the default group may."""
    done = []

    def work() -> None:
        time.sleep(3 * seconds)
        done.append(dist.get_rank())

    def limit(seconds: float) -> None:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), dist.group.WORLD)  # pyright: ignore

    together(lambda: None)
    limit(seconds)
    try:
        lead_first(work)
    finally:
        limit(TIMEOUT_SECONDS)
    return len(done)


def refused() -> str:
    def refuse() -> None:
        raise InputError("no text")

    with pytest.raises(Agreed) as caught:
        lead_first(refuse)
    return str(caught.value)


@pytest.mark.ranks
def test_the_others_wait_for_the_first(two_ranks: RankPool) -> None:
    assert two_ranks.run(waited, 1.0) == [1, 0]
    assert two_ranks.run(refused) == ["no text"] * 2


def broken() -> tuple[str, str]:
    """What a failure of rank 1 is on this rank. Collective."""

    def lose() -> None:
        if dist.get_rank() == 1:
            raise OSError("lost")

    with pytest.raises(RuntimeError) as caught:
        together(lose)
    return type(caught.value).__name__, str(caught.value)


@pytest.mark.ranks
def test_a_failure_is_not_that_of_the_rank_that_hears_of_it(two_ranks: RankPool) -> None:
    """Else its host would be blamed."""
    text = "rank 1: OSError: lost"
    assert two_ranks.run(broken) == [("PeerError", text), ("RuntimeError", text)]
