"""When a stop is asked for, with a made-up clock, and what reaches a process whose main thread is in C."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llm.cluster.signals import LAUNCHER_DIED, SAME_SECONDS, TIME_LIMIT, Stop

ROOT = Path(__file__).resolve().parents[2]
TERM, INT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("asked", "reason", "left"),
    [
        ([(0, TERM)], TERM, []),
        ([(0, INT), (0.1, TERM), (SAME_SECONDS, INT)], INT, []),
        ([(0, INT), (SAME_SECONDS + 0.1, TERM)], INT, [143]),
        ([(0, USR1), (1, USR1), (SAME_SECONDS + 1, USR1)], USR1, [138]),
        ([(0, LAUNCHER_DIED), (60, TERM)], LAUNCHER_DIED, []),
        ([(0, LAUNCHER_DIED), (60, TERM), (66, TERM)], LAUNCHER_DIED, [143]),
        ([(0, TERM), (60, LAUNCHER_DIED)], TERM, []),
    ],
)
def test_what_is_the_same_stop(asked: list[tuple[float, int]], reason: int, left: list[int]) -> None:
    clock, codes = Clock(), []
    stop = Stop(clock, codes.append)
    assert stop.asked() == 0
    for seconds, number in asked:
        clock.now = 1000 + seconds
        stop.ask(number)
    assert (stop.asked(), codes) == (reason, left)


def test_the_time_limit() -> None:
    clock, codes = Clock(), []
    stop = Stop(clock, codes.append)
    stop.limit(None)
    clock.now += 1e9
    assert stop.asked() == 0
    clock.now = 1000
    stop.limit(2)
    clock.now += 119
    assert stop.asked() == 0
    clock.now += 1
    assert stop.asked() == TIME_LIMIT
    clock.now += 60  # the first signal, however late, is no reason to leave
    stop.ask(TERM)
    assert (stop.asked(), codes) == (TIME_LIMIT, [])


# The second lock of a mutex never returns, so no Python handler ever runs.
STUCK = """
import ctypes, signal, time
from llm.cluster.signals import Stop
stop = Stop(clock=lambda: 20 * time.monotonic())
stop.listen()
print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN, flush=True)
mutex = ctypes.create_string_buffer(64)
for _ in range(2):
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


def test_a_process_stuck_in_c_leaves_at_the_second_signal() -> None:
    command = [sys.executable, "-c", STUCK]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "False\n"
            process.send_signal(TERM)
            time.sleep(0.5)  # 10 s on its clock
            assert process.poll() is None
            process.send_signal(TERM)
            assert process.wait(timeout=30) == 143
        finally:
            process.kill()


def test_what_a_process_was_started_to_ignore_stays_ignored() -> None:
    command = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", sys.executable, "-c", STUCK]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "True\n"
        finally:
            process.kill()
