"""launch/pretrain.py on a disk where each write of a checkpoint's file takes SLOW_SECONDS."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

from launch.pretrain import pretrain  # noqa: E402
from llm import files  # noqa: E402
from llm.cluster.script import run_script  # noqa: E402
from llm.cluster.signals import Stop  # noqa: E402

fast = files.create_safetensors


def create_safetensors(*arguments: Any) -> tuple[int, str]:
    time.sleep(float(os.environ["SLOW_SECONDS"]))
    return fast(*arguments)


if __name__ == "__main__":
    files.create_safetensors = create_safetensors
    run_script(pretrain, Stop())
