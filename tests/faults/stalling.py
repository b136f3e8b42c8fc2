"""launch/pretrain.py with a fault of one rank or all in a step, once in each run.

usage: FAULT=KIND@RANK:STEP stalling.py ARGUMENTS     RANK may be `all`; slow@RANK:STEP lasts from that step on

Who does it leaves its pid in runs/<name>/fired-<rank>, and does not do it again where that lies.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

from launch.pretrain import pretrain  # noqa: E402
from llm import files  # noqa: E402
from llm.cluster.script import run_script  # noqa: E402
from llm.cluster.signals import Stop  # noqa: E402
from llm.model.gpt import GPT  # noqa: E402
from llm.train.engines.plain import PlainEngine  # noqa: E402
from llm.train.feed import Feed  # noqa: E402
from llm.train.loop import Trainer  # noqa: E402


def stop_here() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def hold_here() -> None:
    """As a call into C that waits and keeps the interpreter's lock: no thread of the process runs any more."""
    ctypes.PyDLL(None).sleep(10**6)


def wait_here() -> None:
    threading.Event().wait()


def write_here() -> None:
    """As a write to a file system that does not answer."""
    pipe = Path("runs") / f"pipe-{os.getpid()}"
    os.mkfifo(pipe)
    os.open(pipe, os.O_WRONLY)


# Whose call does not end, of which class or module, and how.
HANGS: dict[str, tuple[Any, str, Any]] = {
    "load": (Feed, "next_step", wait_here),
    "reduce": (PlainEngine, "_reduce", wait_here),
    "stopped": (PlainEngine, "_reduce", stop_here),
    "held": (PlainEngine, "_reduce", hold_here),
    "write": (files, "create_safetensors", write_here),
}


def main() -> None:
    kind, _, where = os.environ["FAULT"].partition("@")
    rank, _, step = where.partition(":")
    healthy_step, done = Trainer.step, {"step": 0}

    def counted(trainer: Trainer) -> Any:
        done["step"] = trainer.run.step + 1
        return healthy_step(trainer)

    def due() -> bool:
        mine = os.environ["RANK"]
        if rank not in (mine, "all") or done["step"] < int(step):
            return False
        name = next(word for word in sys.argv if word.startswith("--name="))[7:]
        fired = Path("runs") / name / f"fired-{mine}"
        if kind != "slow" and fired.exists():
            return False
        fired.write_text(str(os.getpid()))
        return True

    Trainer.step = counted
    if kind == "slow":
        healthy = GPT.forward

        def forward(model: GPT, *inputs: Any) -> Any:
            start = time.perf_counter()
            result = healthy(model, *inputs)
            if model.training and due():
                time.sleep(4 * (time.perf_counter() - start))
            return result

        GPT.forward = forward
    else:
        owner, name, hang = HANGS[kind]
        usual = getattr(owner, name)

        def hanging(*arguments: Any) -> Any:
            if due():
                hang()
            return usual(*arguments)

        setattr(owner, name, hanging)
    run_script(pretrain, Stop())


if __name__ == "__main__":
    main()
