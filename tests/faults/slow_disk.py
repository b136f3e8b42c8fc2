"""launch/pretrain.py on a disk where each write of a file of tensors takes SLOW_SECONDS, or which is full (SLOW_FULL).

Both from the checkpoint of step SLOW_FROM on, if that is set.
"""

from __future__ import annotations

import errno
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

fast, write_all = files.create_safetensors, files.write_all


def affected(path: str) -> bool:
    folder = Path(path).parent.name
    return folder.endswith(".tmp") and int(folder[5:-4]) >= int(os.environ.get("SLOW_FROM", "0"))


def create_safetensors(path: Path, *arguments: Any) -> tuple[int, str]:
    time.sleep(float(os.environ.get("SLOW_SECONDS", "0")) if affected(str(path)) else 0)
    return fast(path, *arguments)


def write_to_full_disk(descriptor: int, view: memoryview) -> None:
    if affected(os.readlink(f"/proc/self/fd/{descriptor}")):
        raise OSError(errno.ENOSPC, "No space left on device")
    write_all(descriptor, view)


if __name__ == "__main__":
    files.create_safetensors = create_safetensors
    if "SLOW_FULL" in os.environ:
        files.write_all = write_to_full_disk
    run_script(pretrain, Stop())
