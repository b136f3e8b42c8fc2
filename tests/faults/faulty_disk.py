"""launch/pretrain.py on a disk of which a rank's calls fail, or kill it, as FAULT says.

FAULT="1 fsync step-00000200.tmp 2 EIO": on rank 1, from the second on, each os.fsync fails of a path that holds this
text. With KILL for the error's name, that call kills the rank instead.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

from launch.pretrain import pretrain  # noqa: E402
from llm.cluster.script import run_script  # noqa: E402
from llm.cluster.signals import Stop  # noqa: E402


def main() -> None:
    rank, name, text, first, what = os.environ["FAULT"].split()
    healthy, count = getattr(os, name), 0

    def faulty(place: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal count
        path = os.readlink(f"/proc/self/fd/{place}") if isinstance(place, int) else str(place)
        count += text in path
        if text not in path or count < int(first):
            return healthy(place, *arguments, **options)
        os.write(2, f"fault: {name} of {path}\n".encode())
        if what == "KILL":
            os.kill(os.getpid(), signal.SIGKILL)
        number = getattr(errno, what)
        raise OSError(number, os.strerror(number), path)

    if os.environ.get("RANK", "0") == rank:
        setattr(os, name, faulty)
    run_script(pretrain, Stop())


if __name__ == "__main__":
    main()
