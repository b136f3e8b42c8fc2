"""launch/pretrain.py on a machine whose clock goes a day back, and two ahead, from one reading to the next."""

from __future__ import annotations

import os
import sys
import time
from itertools import cycle
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from launch.pretrain import pretrain  # noqa: E402
from llm.cluster.script import run_script  # noqa: E402
from llm.cluster.signals import Stop  # noqa: E402

DAY = 24 * 60 * 60
healthy, jumps = time.time, cycle((0, -DAY, DAY))
told: list[float] = []


def odd_time() -> float:
    jump = next(jumps)
    if jump and not told:
        told.append(jump)
        os.write(2, b"fault: the clock has jumped\n")
    return healthy() + jump


if __name__ == "__main__":
    time.time = odd_time
    run_script(pretrain, Stop())
