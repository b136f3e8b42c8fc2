"""The wish to stop a run: of whoever sends SIGTERM, SIGINT or SIGUSR1, of the clock, or because the launcher has died.

It is only noted here. llm/train/ballot.py lets the ranks agree on it between two steps, where all is saved.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

# Launchers double signals: after Ctrl-C `deepspeed` sends SIGTERM too, and `scancel` reaches torchrun's ranks twice.
SAME_SECONDS = 5.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Numbers beyond those of signals, so that ranks can agree on the greatest.
TIME_LIMIT, LAUNCHER_DIED = 1000, 1001
SAVE_FAILED = 2000  # beside the steps: never the reason of a stop, for the ranks then raise its error
REASONS = {
    **{number.value: number.name for number in SIGNALS},
    TIME_LIMIT: "train.max_minutes",
    LAUNCHER_DIED: "the death of its launcher",
}


class Stop:
    """What this process has been asked; one of REASONS, or 0.

    clock: seconds; leave: ends the process at once with an exit code.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, leave: Callable[[int], object] = os._exit) -> None:
        self.clock, self.leave = clock, leave
        self.started = clock()
        self.reason, self.deadline = 0, math.inf
        self.start: str | None = None
        """What launch/relay.sh calls this start, and looks for in the record of a stop."""
        self.failed: Path | None = None
        """Where the run records why it failed; None as long as its folder is not known."""
        self.signalled: float | None = None
        self.noted = threading.Event()
        """Set by the first of SIGNALS."""

    def limit(self, minutes: float | None) -> None:
        """Ask for the stop `minutes` after this object was made; None: never."""
        self.deadline = math.inf if minutes is None else self.started + 60 * minutes

    def ask(self, reason: int) -> None:
        """Ask for the stop. A signal more than SAME_SECONDS after the first one ends the process, with 128 + number."""
        if reason in SIGNALS:
            now = self.clock()
            self.signalled = self.signalled or now
            self.noted.set()
            if now - self.signalled > SAME_SECONDS:
                self.leave(128 + reason)
        self.reason = self.reason or reason

    def asked(self) -> int:
        """Why the run is to stop; 0: it is not."""
        if self.clock() >= self.deadline:
            self.ask(TIME_LIMIT)
        return self.reason

    def await_end(self, seconds: float) -> bool:
        """Wait to be ended by one of SIGNALS, of a process that has nothing to save. In the main thread.

        Whether one had come before, and was only noted: then it returns at once, else after `seconds`.
        """
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        return self.noted.wait(seconds)

    def listen(self) -> None:
        """Let SIGNALS ask from now on, but not those that this process was started to ignore. In the main thread."""
        # Python runs a handler once the main thread is back from C, and a rank may wait in a collective for ever. What
        # the interpreter writes to a socket at once is read by a thread.
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.detach(), warn_on_full_buffer=False)
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda number, frame: None)
                signal.siginterrupt(number, False)  # C code may not know how to go on

        def watch() -> None:
            while True:
                for number in reader.recv(16):
                    if number in SIGNALS:
                        self.ask(number)

        threading.Thread(target=watch, name="signals", daemon=True).start()
