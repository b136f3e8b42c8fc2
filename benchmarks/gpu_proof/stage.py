"""`python -m benchmarks.gpu_proof.stage NAME FILE`: one stage of the proof, in a process of its own.

Before an item begins and after it has ended a line is appended to FILE: a process that hangs or dies has told where,
and the next one goes on behind that item. An interrupt says that the stage's time is over.
"""

import faulthandler
import sys
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from triton import knobs

from benchmarks import report
from benchmarks.report import Record

Items = dict[str, Callable[[], Record]]
# In order of worth: the module of this folder in which a function of the stage's name makes its items; the most seconds
# of the stage, and of an item.
STAGES = {
    "machine": ("machine", 60, 50),
    "correctness": ("correctness", 80, 40),
    "gluon": ("correctness", 60, 15),
    "gluon_speed": ("speed", 80, 25),
    "attention": ("speed", 60, 40),
    "tiles": ("speed", 60, 30),
    "kernels": ("speed", 60, 40),
    "training": ("training", 400, 90),
}
NO_HOPPER: Items = {"no Hopper GPU, nothing to do": dict}  # of the stages of Gluon kernels
TAIL = 1200  # characters of a traceback


class Compilations:
    """Listens to Triton: how many kernels came from the cache, and the seconds of those that were compiled."""

    def __init__(self) -> None:
        self.loaded, self.compiled = 0, {}

    def __call__(self, *, metadata: dict[str, Any], times: Any, cache_hit: bool, **_: Any) -> None:
        self.loaded += cache_hit
        if not cache_hit:
            seconds = self.compiled.get(metadata["name"], 0.0) + times.total / 1e6
            self.compiled[metadata["name"]] = round(seconds, 2)


def items_of(records: list[Record], stage: str) -> dict[str, Record]:
    """What is known last of each item of a stage."""
    return {record["item"]: record for record in records if record["stage"] == stage and "item" in record}


def tail_of(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)).strip()[-TAIL:]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def usable(device: torch.device) -> bool:
    """Whether the GPU still answers this process: after an illegal access it never does again."""
    try:
        wait(device)
    except RuntimeError:
        return False
    return True


def measured(action: Callable[[], Record], device: torch.device) -> Record:
    """What an item gives, or why it failed."""
    try:
        found = action()
        wait(device)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  whatever an item raises is its result
        return {"status": "stopped" if isinstance(error, KeyboardInterrupt) else "failed", "error": tail_of(error)}
    return {"status": "wrong" if "wrong" in found else "done"} | found


def run(name: str, file: Path, device: torch.device, seconds: float = 0) -> bool:
    """Run the items of a stage that `file` does not know; False if this process cannot go on.

    seconds: after which an item ends the process; 0: never.
    """
    known = items_of(report.read(file)[1], name)
    items: Items = getattr(import_module(f"benchmarks.gpu_proof.{STAGES[name][0]}"), name)(device)
    for item in [item for item in items if item not in known]:
        report.append(file, {"stage": name, "item": item, "status": "begun"})
        print(f"{name}: {item}", flush=True)
        if seconds:
            faulthandler.dump_traceback_later(seconds, exit=True)
        listener = knobs.compilation.listener = Compilations()
        began = time.perf_counter()
        found = measured(items[item], device)
        faulthandler.cancel_dump_traceback_later()
        record = {"stage": name, "item": item, "seconds": round(time.perf_counter() - began, 2)}
        report.append(file, record | vars(listener) | found)
        if found["status"] == "stopped" or (found["status"] != "done" and not usable(device)):
            return False
    return True


if __name__ == "__main__":
    there = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sys.exit(0 if run(sys.argv[1], Path(sys.argv[2]), there, STAGES[sys.argv[1]][2]) else 3)
