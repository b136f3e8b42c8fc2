"""Ends a run that hangs, and says which rank stalls, where and in what: a loader, a save, a process that is stopped.

Once a second each rank publishes what it is at, through a connection of its own to the store where the ranks have met:
no collective is needed, and nothing that another thread waits for is in the way. Rank 0 reads all and judges. The
others read rank 0's alone, which tells them of a verdict, and judge rank 0 when it has fallen silent.

All ranks run one program, so they pass the same marks: the phases that they enter and the collectives that they begin.
A rank that waits for another in a collective has begun one more than that one. So whoever has passed the fewest stalls.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from torch._C import _distributed_c10d

from llm import files
from llm.cluster.failure import BAD_HOST, PASSING, record_failure, tell_start
from llm.cluster.ranks import Ranks

T = TypeVar("T")
PERIOD_SECONDS = 1.0
# A process from which nothing new came for so long is stopped, gone, or holds the interpreter's lock.
SILENT_SECONDS = 5.0
# From the verdict to the end of each process: the others hear of it, and all write their stacks.
LEAVE_SECONDS = 4.0


class Verdict(NamedTuple):
    code: int
    """The exit code of all ranks: one of llm/cluster/failure.py."""
    reason: str
    rank: int
    """That stalls, or the first of those."""
    host: str


class Beat(NamedTuple):
    """What a rank publishes."""

    number: int = 0
    marks: int = 0
    """Phases entered and collectives begun."""
    idle: float = 0.0
    """Seconds without progress; 0 until the first step is done."""
    at: str = "start"
    """Phase, step, and the function in which the main thread is."""
    verdict: Verdict | None = None


def judge(
    beats: Mapping[int, Beat], silence: Mapping[int, float], hosts: Sequence[str], limit: float
) -> Verdict | None:
    """Who has made no progress for `limit` seconds, if the run stalls.

    beats: the last of some ranks, or all; silence: the seconds since each; hosts: of all ranks. Those who wait for
    others are not blamed, nor is a rank that is only not heard of: somebody must wait for it.
    """
    silent = [rank for rank in beats if silence[rank] > SILENT_SECONDS]
    fewest = min(beat.marks for beat in beats.values())
    stalled = silent or [rank for rank, beat in beats.items() if beat.marks == fewest]
    idle = {rank: beat.idle + silence[rank] for rank, beat in beats.items()}
    heard = [rank for rank in beats if rank not in silent]
    if min(idle[rank] for rank in stalled) <= limit or not any(idle[rank] > limit for rank in heard):
        return None
    first, waits = stalled[0], next((rank for rank in beats if rank not in stalled), None)
    seconds, at = f"for {idle[first]:.0f} s", beats[first].at
    if waits is None and len(beats) > 1:
        reason = f"all {len(beats)} ranks have made no progress {seconds} (rank {first}: {at}); none waits for another"
        return Verdict(PASSING, f"{reason}: suspect what they share, the file system or the network", first, hosts[0])
    names = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in stalled[:8]) + (", ..." if stalled[8:] else "")
    fault = f"was not heard of {seconds}, last in" if silent else f"has made no progress {seconds} in"
    reason = f"{names} {fault} {at}"
    reason += ": the process is stopped or its host is down" if silent else ""
    reason += "" if waits is None else f"; rank {waits} waits in {beats[waits].at}"
    # Only a host of which nothing is heard is bad: a process may hang for any reason.
    dead = silent and all(hosts[rank] != hosts[first] for rank in heard)
    return Verdict(BAD_HOST if dead else PASSING, reason, first, hosts[first])


def connect(ranks: Ranks, start: str, timeout_seconds: float) -> dist.Store:
    """The store where the ranks have met, by a connection of its own; start: the name of this start of the run."""
    limit = timedelta(seconds=timeout_seconds)
    store = dist.TCPStore(ranks.master_addr, ranks.master_port, is_master=False, timeout=limit, wait_for_workers=False)
    return dist.PrefixStore(f"heartbeat {start}", store)


class Heartbeat:
    """What the main thread is at; from `watch` to `close`, threads publish and judge it.

    Args:
        limit: seconds without progress that end the run; None: nothing is watched.
        hosts: of all ranks.
        groups: the process groups whose collectives are marks; that of the saves is added by the trainer.
        work: grows while the main thread works between two marks, where the ranks may differ.
        failed: the record of the failure; the stacks of this rank go into the folder `stalls` beside it.
    """

    def __init__(
        self,
        limit: float | None = None,
        rank: int = 0,
        hosts: Sequence[str] = (),
        store: dist.Store | None = None,
        *,
        groups: Sequence[Any] = (),
        work: Callable[[], int] = lambda: 0,
        failed: Path = Path(),
        clock: Callable[[], float] = time.monotonic,
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        self.limit, self.rank, self.hosts, self.store = limit, rank, hosts, store
        self.groups, self.work, self.failed, self.clock, self.leave = [*groups], work, failed, clock, leave
        self.phase, self.entered, self.items, self.step = "start", 0, 0, 0
        self.done, self.watching = threading.Event(), False
        self.mine = Beat()
        self.beats = {0: Beat(), rank: Beat()}  # rank 0 may stop, and the store with it, before it was ever heard of
        self.numbers, self.heard = dict[int, int](), dict[int, float]()
        self.last, self.seconds, self.seen, self.since = clock(), 0.0, (-1, -1), 0.0
        if store is not None:
            self._publish()

    def enter(self, phase: str, step: int | None = None) -> None:
        """The main thread begins a phase, as those of all ranks do."""
        self.phase, self.step, self.entered = phase, self.step if step is None else step, self.entered + 1

    def each(self, phase: str, items: Iterable[T]) -> Iterator[T]:
        """The items, each of which is progress while the main thread is in `phase`: a save must not hide a hang."""
        for item in items:
            self.items += self.phase == phase
            yield item

    def watch(self) -> None:
        """Begin, where that has not been done: when the first step is done, before which things are compiled."""
        if self.limit is not None and not self.watching:
            self.watching, self.last = True, self.clock()
            for loop in (self._exchange_all, self._watch):
                threading.Thread(target=loop, name=f"heartbeat{loop.__name__}", daemon=True).start()

    def close(self) -> None:
        self.done.set()

    def _exchange_all(self) -> None:
        """Only this thread waits for the store, which is rank 0's process, and may be stopped."""
        with suppress(RuntimeError):  # the store is gone, and with it rank 0: it is silent from here on
            while not self.done.wait(PERIOD_SECONDS):
                self._publish()
                keys = range(len(self.hosts)) if self.rank == 0 else [0]
                found = self.store.multi_get([str(key) for key in keys]) if self.store is not None else []
                self.beats |= {key: _parsed(text) for key, text in zip(keys, found, strict=False)}

    def _publish(self) -> None:
        if self.store is not None:
            self.store.set(str(self.rank), json.dumps(self.mine))

    def _watch(self) -> None:
        while not self.done.wait(PERIOD_SECONDS):
            verdict = self.tick()
            if verdict is not None:
                self._end(verdict)
                return

    def tick(self) -> Verdict | None:
        """Renew this rank's beat, and judge by those that came. Never waits."""
        now, limit = self.clock(), self.limit or 0
        # A pause of this process as a whole, such as Ctrl-Z, counts for no rank.
        self.seconds += min(now - self.last, SILENT_SECONDS)
        self.last = now
        marks = self.entered + sum(group._get_sequence_number_for_group() for group in self.groups)
        seen = marks, self.items + self.work()
        if seen != self.seen:
            self.seen, self.since = seen, self.seconds
        at = f"{self.phase} of step {self.step}, {_place()}"
        self.mine = Beat(self.mine.number + 1, marks, self.seconds - self.since, at)
        beats = self.beats | {self.rank: self.mine}
        for rank, beat in beats.items():
            if beat.number != self.numbers.get(rank):
                self.numbers[rank], self.heard[rank] = beat.number, self.seconds
        silence = {rank: self.seconds - self.heard[rank] for rank in beats}
        told = beats[0].verdict if 0 in beats else None
        if told is None and (self.rank == 0 or silence.get(0, 0) > SILENT_SECONDS):
            told = judge(beats, silence, self.hosts, limit)
        self.mine = self.mine._replace(verdict=told)
        return told

    def _end(self, verdict: Verdict) -> None:
        """End this process with the verdict's code, even where a file system or a pipe hangs."""
        for action in (self._say, self._record):
            threading.Thread(target=action, args=(verdict,), daemon=True).start()
        time.sleep(LEAVE_SECONDS)
        self.leave(verdict.code)

    def _say(self, verdict: Verdict) -> None:
        faulthandler.dump_traceback(2, all_threads=True)
        os.write(2, f"error: the run stalls: {verdict.reason}\n".encode())

    def _record(self, verdict: Verdict) -> None:
        tell_start(verdict.code, os.environ)
        record_failure(self.failed, verdict.code, verdict.reason, rank=verdict.rank, host=verdict.host)
        path = self.failed.parent / f"stalls/rank-{self.rank}.txt"
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with files.open_own(path, "w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        # NCCL's flight recorder: which collectives are under way. A torch without NCCL has none.
        recorded = getattr(_distributed_c10d, "_dump_nccl_trace_json", bytes)()
        if recorded:
            files.replace(path.with_suffix(".nccl.json"), recorded)


def _parsed(text: bytes) -> Beat:
    beat = Beat(*json.loads(text))
    return beat if beat.verdict is None else beat._replace(verdict=Verdict(*beat.verdict))


def _place() -> str:
    """The function in which the main thread is, with its file and line."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    return f"{frame.f_code.co_name} ({os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})"
