"""The ranks of mpirun: `mpirun -n 9 python launch/prepare_data.py all --config FILE --engine.kind=mpi`."""

from __future__ import annotations

import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal

from llm.crawl.engines.worker import STOP, Given, run_here, serve
from llm.crawl.tasks import Task, Works
from llm.errors import InputError

PAUSE = 0.01  # seconds between two looks for a message: MPI's own waiting would take a core


class Mpi:
    """dynamic: rank 0 gives every other rank its next task; striped: each of n ranks, 0 too, takes every n-th task.

    The block gives None to the ranks but 0, when there is nothing left for them to do.
    """

    def __init__(self, works: Works, schedule: Literal["dynamic", "striped"]) -> None:
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:  # RuntimeError: no MPI library was found
            raise InputError(
                f"engine.kind mpi needs mpi4py and an MPI library: {error}; pip install 'ingot[mpi]'"
            ) from error
        self._mpi: Any = MPI
        self._comm: Any = MPI.COMM_WORLD
        self.works, self._schedule = works, schedule

    def __enter__(self) -> Mpi | None:
        if self._comm.rank == 0:
            return self
        serve(self.works, lambda: self._receive()[1], lambda message: self._send(0, message))
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is not None:  # the others are at work, or wait for it: they are ended with this one
            known = isinstance(error, InputError)
            print(
                f"error: {error}" if known else "".join(traceback.format_exception(error)), file=sys.stderr, flush=True
            )
            self._comm.Abort(2 if known else 1)
        if self._comm.rank == 0:
            for rank in range(1, self._comm.size):
                self._send(rank, STOP)

    def run(self, stage: str, tasks: Sequence[Task], progress: Callable[[int], None]) -> None:
        """As llm.crawl.tasks.Engine says."""
        size = self._comm.size
        if size == 1:
            run_here(self.works(stage), tasks, progress)
            return
        given = Given(stage, progress)

        def ended(number: int, _frame: object) -> None:
            raise InputError(f"ended by {signal.Signals(number).name} while these were under way: {given}")

        handler = signal.signal(signal.SIGTERM, ended)  # mpirun sends it when a rank has died
        try:
            self._striped(stage, tasks, given) if self._schedule == "striped" else self._dynamic(tasks, given)
        finally:
            signal.signal(signal.SIGTERM, handler)

    def _dynamic(self, tasks: Sequence[Task], given: Given) -> None:
        waiting = deque(tasks)
        for rank in range(1, min(self._comm.size, len(tasks) + 1)):
            self._send(rank, given.give(rank, waiting.popleft()))
        while given:
            rank, message = self._receive()
            if given.heard(rank, message) and waiting:
                self._send(rank, given.give(rank, waiting.popleft()))

    def _striped(self, stage: str, tasks: Sequence[Task], given: Given) -> None:
        size = self._comm.size
        messages = [(rank, given.give(rank, task)) for rank in range(1, size) for task in tasks[rank::size]]
        sent = [self._comm.Isend([message, self._mpi.BYTE], rank) for rank, message in messages]
        run_here(self.works(stage), tasks[::size], lambda done: given.moved(0, done))
        while given:
            given.heard(*self._receive())
        self._mpi.Request.Waitall(sent)

    def _send(self, rank: int, message: bytes) -> None:
        self._comm.Send([message, self._mpi.BYTE], rank)

    def _receive(self) -> tuple[int, bytes]:
        """The rank and the content of the next message."""
        status = self._mpi.Status()
        while not self._comm.Iprobe(status=status):
            time.sleep(PAUSE)
        message = bytearray(status.Get_count(self._mpi.BYTE))
        self._comm.Recv([message, self._mpi.BYTE], status.source)
        return status.source, bytes(message)
