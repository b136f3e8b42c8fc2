"""launch/pretrain.py whose steps each take FAULT seconds longer, as those of a larger model would."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

from launch.pretrain import pretrain  # noqa: E402
from llm.cluster.script import run_script  # noqa: E402
from llm.cluster.signals import Stop  # noqa: E402
from llm.train.loop import Trainer  # noqa: E402

healthy_step = Trainer.step


def step(self: Trainer) -> Any:
    time.sleep(float(os.environ["FAULT"]))
    return healthy_step(self)


if __name__ == "__main__":
    Trainer.step = step
    run_script(pretrain, Stop())
