"""Processes of this machine. One that dies is known at once, and its task is named."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from llm.crawl.engines.worker import Given, run_here, serve
from llm.crawl.tasks import Task, Works
from llm.errors import InputError

SECONDS = 5.0  # that a process has to end after SIGTERM


class Local:
    """`workers` processes, which are started when they are needed and live until the block ends."""

    def __init__(self, works: Works, workers: int) -> None:
        self._works, self._workers = works, workers
        self.works: Works = lru_cache(1)(works)  # the stage that is looked at, and then run, here
        self._processes = dict[Connection, BaseProcess]()

    def __enter__(self) -> Local:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def run(self, stage: str, tasks: Sequence[Task], progress: Callable[[int], None]) -> None:
        """As llm.crawl.tasks.Engine says. What has one task, or one worker, is done in this process, on all cores."""
        if min(self._workers, len(tasks)) == 1:
            run_here(self.works(stage), tasks, progress)
            return
        given, waiting = Given(stage, progress), deque(tasks)
        try:
            while len(self._processes) < min(self._workers, len(tasks)):
                self._start()
            for pipe in self._processes:
                if waiting:
                    self._give(pipe, given, waiting.popleft())
            while given:
                for pipe in wait(list(self._processes)):
                    assert isinstance(pipe, Connection)
                    if given.heard(pipe, self._message(pipe, given)) and waiting:
                        self._give(pipe, given, waiting.popleft())
        except BaseException:
            self._stop()  # now: what they have begun is removed after this
            raise

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")  # fork would copy locks that threads hold
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=_work, args=(self._works, theirs), daemon=True)
        # A terminal's Ctrl-C goes to all, from their first moment on: the first process ends the others.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # they inherit it
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()  # so that the process has its only end
        self._processes[ours] = process

    def _message(self, pipe: Connection, given: Given) -> bytes:
        try:
            return pipe.recv_bytes()
        except (EOFError, ConnectionError):
            raise self._death(pipe, given) from None

    def _give(self, pipe: Connection, given: Given, task: Task) -> None:
        try:
            pipe.send_bytes(given.give(pipe, task))
        except ConnectionError:  # it has died since the last stage
            raise self._death(pipe, given) from None

    def _death(self, pipe: Connection, given: Given) -> InputError:
        process = self._processes[pipe]
        process.join(SECONDS)
        code = process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        memory = " (by the system, if nobody else: too little memory)" if code == -signal.SIGKILL else ""
        advice = "run the same command again, with fewer engine.workers if memory ran out: finished tasks are kept"
        return InputError(f"{given.in_hand(pipe)}: its process {how}{memory}; {advice}")

    def _stop(self) -> None:
        for process in self._processes.values():
            process.terminate()
        for pipe, process in self._processes.items():
            process.join(SECONDS)
            process.kill()
            process.join()
            pipe.close()
        self._processes.clear()


def _work(works: Works, pipe: Connection) -> None:
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    # One thread each: there is a process for each core.
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "RAYON_RS_NUM_CPUS"), "1")
    with suppress(EOFError, ConnectionError):  # the first process is gone
        serve(works, pipe.recv_bytes, pipe.send_bytes)


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
