"""Who is said to stall: by made-up beats and clocks, and on two real ranks of which one waits for the other."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from llm.cluster import heartbeat
from llm.cluster.failure import BAD_HOST, PASSING
from llm.cluster.heartbeat import Beat, Heartbeat, Verdict, judge
from pool import RankPool

HOSTS = ["a", "a", "b", "b"]
LIMIT = 30.0


def beat(marks: int, idle: float, at: str = "load of step 7") -> Beat:
    return Beat(1, marks, idle, at)


def verdict(beats: list[Beat], silence: tuple[float, ...] = (0, 0, 0, 0), hosts: list[str] = HOSTS) -> Verdict | None:
    return judge(dict(enumerate(beats)), dict(enumerate(silence)), hosts, LIMIT)


WAITS = beat(9, 31, "forward_backward of step 7, all_reduce")


def test_who_has_begun_fewer_collectives_is_named_and_not_who_waits() -> None:
    found = verdict([WAITS, WAITS, beat(8, 31), WAITS])
    assert found is not None
    assert (found.code, found.rank, found.host) == (PASSING, 2, "b")
    assert found.reason.startswith("rank 2 on b has made no progress for 31 s in load of step 7")
    assert found.reason.endswith("; rank 0 waits in forward_backward of step 7, all_reduce")


def test_all_who_are_behind_are_named() -> None:
    found = verdict([WAITS, beat(8, 31), beat(8, 33), WAITS])
    assert found is not None
    assert found.reason.startswith("rank 1 on a, rank 2 on b has made")


def test_a_loader_that_hangs_on_all_ranks_is_nobodys() -> None:
    found = verdict([beat(8, 31)] * 4)
    assert found is not None and found.code == PASSING
    assert found.reason.startswith("all 4 ranks have made no progress for 31 s (rank 0: load of step 7)")


def test_a_process_alone() -> None:
    found = judge({0: beat(8, 31)}, {0: 0}, ["a"], LIMIT)
    assert found is not None and (found.rank, found.code) == (0, PASSING)
    assert found.reason == "rank 0 on a has made no progress for 31 s in load of step 7"


@pytest.mark.parametrize(
    ("silence", "hosts", "code"),
    [
        ((0, 0, 31, 31), HOSTS, BAD_HOST),
        ((0, 0, 31, 0), HOSTS, PASSING),  # its host is there: another rank of it is heard
        ((0, 0, 31, 31), ["a"] * 4, PASSING),  # there is no other host to take
    ],
)
def test_a_silent_rank_is_named_before_any_other(silence: tuple[float, ...], hosts: list[str], code: int) -> None:
    """Even where it had begun the collective in which the others wait."""
    found = verdict([WAITS, beat(8, 31), WAITS, WAITS], silence, hosts)
    assert found is not None
    assert (found.code, found.rank, found.host) == (code, 2, hosts[2])
    assert "rank 2 on " + hosts[2] in found.reason and "was not heard of for 62 s" in found.reason
    assert ("rank 3" in found.reason) == (silence[3] > 0)


def test_who_waits_for_a_rank_that_works_is_no_stall() -> None:
    assert verdict([WAITS, WAITS, beat(8, 2), WAITS]) is None


def test_lost_beats_end_no_run_that_goes_on() -> None:
    assert verdict([beat(9, 1), beat(9, 1), beat(3, 1), beat(9, 1)], (0, 0, 99, 0)) is None


@pytest.mark.parametrize("idle", [29, 30])
def test_no_stall_before_the_limit(idle: float) -> None:
    assert verdict([beat(8, idle)] * 4) is None


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Rank:
    """A rank by hand: each second it ticks, and the beats of the ranks that are heard arrive."""

    def __init__(self, rank: int = 0, hosts: tuple[str, ...] = ("a",)) -> None:
        self.clock, self.worked = Clock(), 0
        self.heart = Heartbeat(LIMIT, rank, hosts, clock=self.clock, work=lambda: self.worked)

    def seconds(self, count: int, each: Callable[[], object] = lambda: None, step: float = 1.0) -> Verdict | None:
        for _ in range(count):
            self.clock.now += step
            each()
            if (found := self.heart.tick()) is not None:
                return found
        return None


def test_a_phase_an_item_and_work_are_progress() -> None:
    rank = Rank()
    rank.heart.enter("load", 7)
    items, saved = rank.heart.each("load", range(10**6)), rank.heart.each("save", range(10**6))
    assert rank.seconds(100, lambda: next(items)) is None
    assert rank.seconds(100, lambda: rank.heart.enter("load")) is None
    assert rank.seconds(100, lambda: setattr(rank, "worked", rank.worked + 1)) is None
    assert rank.seconds(30, lambda: next(saved)) is None
    found = rank.seconds(1, lambda: next(saved))  # beside the steps, which hang
    assert found is not None and "in load of step 7, " in found.reason


def test_a_process_that_was_paused_is_not_ended_when_it_goes_on() -> None:
    rank = Rank()
    assert rank.seconds(10) is None
    assert rank.seconds(1, step=10**5) is None
    assert rank.seconds(10) is None


def test_others_judge_rank_0_once_it_is_silent() -> None:
    rank = Rank(1, ("a", "b"))
    rank.heart.beats = {0: Beat(5, 3, 0, "save of step 7, write"), 1: Beat()}
    found = rank.seconds(60)
    assert found is not None
    assert (found.rank, found.host, found.code) == (0, "a", BAD_HOST)
    assert 30 < rank.heart.seconds <= 32


def test_others_judge_a_rank_0_that_was_never_heard_of() -> None:
    """It was stopped in the first second, and the store with it."""
    found = Rank(1, ("a", "b")).seconds(60)
    assert found is not None
    assert (found.rank, found.host, found.code) == (0, "a", BAD_HOST)


def test_others_leave_the_judgement_to_a_rank_0_that_is_heard() -> None:
    rank = Rank(1, ("a", "b"))

    def hear() -> None:
        rank.heart.beats[0] = Beat(rank.heart.mine.number, 3)

    assert rank.seconds(100, hear) is None
    told = Verdict(PASSING, "rank 1 ...", 1, "b")
    rank.heart.beats[0] = Beat(10**6, 3, verdict=told)
    assert rank.heart.tick() == told


def test_nothing_is_watched_without_a_limit() -> None:
    heart, before = Heartbeat(), threading.active_count()
    heart.watch()
    assert threading.active_count() == before


def test_a_file_system_that_hangs_does_not_keep_a_process_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    left, gone = [], threading.Event()
    monkeypatch.setattr(heartbeat, "LEAVE_SECONDS", 0.3)
    monkeypatch.setattr(heartbeat, "record_failure", lambda *record, **more: gone.wait(20))
    heart = Heartbeat(LIMIT, failed=tmp_path / "failed.json", leave=left.append)
    start = time.monotonic()
    heart._end(Verdict(PASSING, "rank 0 on a ...", 0, "a"))
    gone.set()
    assert left == [PASSING] and time.monotonic() - start < 10
    told = capfd.readouterr().err
    assert "error: the run stalls: rank 0 on a ..." in told and "test_a_file_system_that_hangs" in told


def stall(folder: Path, stopped: bool) -> dict[str, Any]:
    """Rank 1 does not come to a collective, as it sleeps or says nothing any more; how rank 0 and 1 end."""
    rank, left, ended = dist.get_rank(), [], threading.Event()
    store = dist.PrefixStore(str(folder), dist.distributed_c10d._get_default_store())

    def leave(code: int) -> None:
        left.append(code)
        ended.set()

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("PERIOD_SECONDS", 0.1), ("SILENT_SECONDS", 1), ("LEAVE_SECONDS", 1)):
            patch.setattr(heartbeat, name, value)
        heart = Heartbeat(
            2, rank, ["a", "b"], store, groups=[dist.group.WORLD], failed=folder / f"failed-{rank}.json", leave=leave
        )
        dist.barrier()
        heart.enter("forward_backward", 7)
        heart.watch()
        if rank == 1 and stopped:
            heart.close()
        if rank == 0:
            dist.all_reduce(torch.ones(1), async_op=False)
        else:
            ended.wait(6 if stopped else 60)
            dist.all_reduce(torch.ones(1))
        assert ended.wait(20) == (rank == 0 or not stopped)
        heart.close()
    record = folder / f"failed-{rank}.json"
    stacks = folder / f"stalls/rank-{rank}.txt"
    return {
        "left": left,
        "record": json.loads(record.read_text()) if record.exists() else None,
        "stacks": stacks.read_text() if stacks.exists() else "",
    }


def test_the_rank_that_sleeps_is_named_by_both(two_ranks: RankPool, tmp_path: Path) -> None:
    first, second = two_ranks.run(stall, tmp_path, False)
    assert first["left"] == second["left"] == [PASSING]
    assert first["record"] == second["record"]
    assert (first["record"]["rank"], first["record"]["host"]) == (1, "b")
    assert "rank 1 on b has made no progress for" in first["record"]["reason"]
    assert "in forward_backward of step 7, wait (threading.py:" in first["record"]["reason"]
    assert "rank 0 waits in forward_backward of step 7, all_reduce (" in first["record"]["reason"]
    assert "all_reduce" in first["stacks"] and "in stall" in second["stacks"]


@pytest.mark.slow
def test_the_rank_that_says_nothing_is_named(two_ranks: RankPool, tmp_path: Path) -> None:
    first, second = two_ranks.run(stall, tmp_path, True)
    assert first["left"] == [BAD_HOST] and second["left"] == []
    assert (first["record"]["rank"], first["record"]["host"], first["record"]["code"]) == (1, "b", BAD_HOST)
    assert "rank 1 on b was not heard of for" in first["record"]["reason"]
    assert os.path.basename(__file__) in first["stacks"]
