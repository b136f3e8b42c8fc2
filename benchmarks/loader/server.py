"""A process that has imported one loader, and forks for each measurement, so that each begins in the same state.

Requests and answers are lines of JSON on its standard streams (runner.py). Run as `python -m benchmarks.loader.server
MODULE CORE FOLDER`.
"""

import importlib
import json
import os
import select
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks.loader.cases import FULL, QUICK, Case
from benchmarks.loader.measure import Figures, measure, prepare

ACTIONS = {"prepare": prepare, "measure": measure}


def main(arguments: list[str]) -> int:
    module, core, folder = arguments
    os.sched_setaffinity(0, {int(core)})
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between the answers
    absent = None
    try:
        importlib.import_module(f"benchmarks.loader.{module}")
    except Exception as error:  # noqa: BLE001  foreign code: whatever keeps it from loading is its result
        absent = describe(error)
    for line in sys.stdin:
        request = json.loads(line)
        found = {"absent": absent} if absent else in_fork(request, Path(folder))
        answers.write(json.dumps(found) + "\n")
        answers.flush()
    return 0


def in_fork(request: dict[str, Any], folder: Path) -> Figures:
    """What the request asks for, computed in a fork that is ended after `patience` seconds, or when nobody asks."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        try:
            scale = QUICK if request["quick"] else FULL
            found = ACTIONS[request["action"]](request["system"], Case(**request["case"]), scale, folder)
        except Exception as error:  # noqa: BLE001  foreign code: whatever it raises is its result
            traceback.print_exc()  # into the log
            found = {"error": describe(error)}
        with os.fdopen(writing, "w") as answer:
            answer.write(json.dumps(found) + "\n")
        os._exit(0)
    os.setpgid(child, child)  # here too: whoever comes first
    os.close(writing)
    with os.fdopen(reading) as answer:
        # Input before the answer is the end of input: the asking process has ended.
        ready = answer in select.select([answer, 0], [], [], request["patience"])[0]
        line = answer.readline() if ready else ""
    if not ready:
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    end_group(child)
    if line:
        return json.loads(line)
    why = f"it ended with status {status}" if ready else f"it took more than {request['patience']:.0f} s"
    return {"error": why}


def end_group(group: int) -> None:
    """End what a measurement has left running, after a second in which it may put things away."""
    try:
        for _ in range(20):
            os.killpg(group, 0)
            time.sleep(0.05)
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass


def describe(error: Exception) -> str:
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0][:200]}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
