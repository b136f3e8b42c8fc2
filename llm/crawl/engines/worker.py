"""How tasks are given to processes: messages are JSON, so that no process runs what another sends."""

from __future__ import annotations

import json
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from llm.crawl.tasks import Task, Work, Works, run_task
from llm.errors import InputError

SECONDS = 0.2  # between two reports of progress
STOP = b""  # the message that sends a worker home


def serve(works: Works, receive: Callable[[], bytes], send: Callable[[bytes], None]) -> None:
    """Do the tasks that come until STOP comes. Each ends with a message `finished` or `error`."""
    work = cache(works)

    def tell(**message: Any) -> None:
        send(json.dumps(message).encode())

    def progress(done: int) -> None:
        nonlocal told
        if time.monotonic() - told > SECONDS:
            told = time.monotonic()
            tell(done=done)

    while asked := receive():
        message, told = json.loads(asked), time.monotonic()
        try:
            run_task(work(message["stage"]), Task.from_json(message["task"]), progress)
        except InputError as error:
            tell(error=str(error))
        except Exception:  # noqa: BLE001 - whatever it is, the process that gives out the tasks tells it
            tell(defect=traceback.format_exc())
        else:
            tell(finished=True)


class Given:
    """The tasks of a stage that workers have, and how far these have come."""

    def __init__(self, stage: str, progress: Callable[[int], None]) -> None:
        self._stage, self._progress, self._finished = stage, progress, 0
        self._tasks = defaultdict[Any, deque[Task]](deque)
        self._done = dict[Any, int]()

    def __bool__(self) -> bool:
        return any(self._tasks.values())

    def give(self, worker: Any, task: Task) -> bytes:
        """The message that gives a worker one more task."""
        self._tasks[worker].append(task)
        return json.dumps({"stage": self._stage, "task": task.to_json()}).encode()

    def heard(self, worker: Any, message: bytes) -> bool:
        """Take in a message of a worker: whether it has finished a task. Raises what it says of a task that failed."""
        found, task = json.loads(message), self._tasks[worker][0]
        if "error" in found:
            raise InputError(f"{task}: {found['error']}")
        if "defect" in found:
            raise RuntimeError(f"{task} failed:\n{found['defect']}")
        if "finished" in found:
            self._finished += self._tasks[worker].popleft().size
        self.moved(worker, min(found.get("done", 0), task.size))
        return "finished" in found

    def moved(self, worker: Any, done: int) -> None:
        """Show that a worker has gone through `done` bytes of what is not finished."""
        self._done[worker] = done
        self._progress(self._finished + sum(self._done.values()))

    def in_hand(self, worker: Any) -> str:
        """What a worker is at, in words."""
        return str(self._tasks[worker][0]) if self._tasks[worker] else "no task"

    def __str__(self) -> str:
        return ", ".join(f"{self.in_hand(worker)} of rank {worker}" for worker in self._tasks if self._tasks[worker])


def run_here(work: Work, tasks: Sequence[Task], progress: Callable[[int], None]) -> None:
    """Do tasks in this process, one after another."""
    before = 0
    for task in tasks:
        try:
            run_task(work, task, lambda done, task=task, before=before: progress(before + min(done, task.size)))
        except InputError as error:
            raise InputError(f"{task}: {error}") from error
        before += task.size
        progress(before)
