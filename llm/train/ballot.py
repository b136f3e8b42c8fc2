"""All ranks decide alike, between two steps, whether the run stops.

A vote is the greatest of two integers per rank, for the stop and for a profile, all-reduced by Gloo on the CPUs: no
GPU is waited for. That of a step begins after its backward pass and is read after the update, behind which it hides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from llm.cluster.signals import REASONS, SAVE_FAILED, Stop
from llm.errors import Stopped
from llm.files import write_json
from llm.parallel.agreement import exchange, together
from llm.train.run_folder import RunFolder

T = TypeVar("T")


class Ballot:
    """The ranks' votes. Every method is collective but one."""

    wanted = 0
    """Steps of the profile that rank 0 asks for in every vote (llm/train/profiling.py); below 0: none, ever."""
    requested = 0
    """The same, once a vote has told all ranks."""
    agreed = 0
    """The reason of the stop (llm/cluster/signals.py) once a vote was for it; who has asked asks in every vote."""

    def __init__(self, stop: Stop | None = None, timeout_seconds: float = 60) -> None:
        """stop: None for a run that nothing stops, and which never votes."""
        self.stop, self.group, self.work = stop, None, None
        if stop is not None and dist.get_world_size() > 1:
            self.group: Any = dist.new_group(timeout=timedelta(seconds=timeout_seconds), backend="gloo")

    def begin(self) -> None:
        """Begin a vote, which `end` ends."""
        if self.stop is not None:
            self.asked = torch.tensor([self.stop.asked(), self.wanted])
            if self.group is not None:
                self.work = dist.all_reduce(self.asked, dist.ReduceOp.MAX, self.group, async_op=True)

    def end(self) -> int:
        """`agreed`, by the vote that was begun."""
        if self.stop is not None:
            if self.work is not None:
                self.work.wait()
            self.agreed, self.requested = self.asked.tolist()
        return self.agreed

    def vote(self) -> int:
        self.begin()
        return self.end()

    def until_stopped(self, items: Iterable[T]) -> Iterator[T]:
        """The items, of which every rank has as many, up to a vote for the stop."""
        for item in items:
            if self.vote():
                return
            yield item

    def save_failed(self) -> None:
        """Let all ranks stop at the same step, which then wait for the save and raise its error. Not collective."""
        if self.stop is not None:
            self.stop.ask(SAVE_FAILED)

    def close(self) -> None:
        """What is left is done whatever is asked, and was."""
        self.stop, self.agreed = None, 0

    def leave_if_asked(self, folder: RunFolder, step: int | None, last: Callable[[], object] = lambda: None) -> None:
        """Vote; for a stop, record it, say it, call `last`, which may take long, and raise Stopped; step: as saved."""
        if self.stop is None or not self.vote():
            return
        starts = exchange(self.stop.start, self.group)
        reason = REASONS[self.agreed]
        what = "before it trained" if step is None else f"after step {step}, which is saved"

        def record() -> None:
            write_json(folder.stopped, {"reason": reason, "step": step, "starts": starts})
            print(f"stopped by {reason} {what}; the same command goes on from there (exit code 75)", flush=True)

        together(lambda: record() if dist.get_rank() == 0 else None, self.group)
        last()
        raise Stopped(reason)
