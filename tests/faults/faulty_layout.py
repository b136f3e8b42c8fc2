"""launch/verify.py with a layout that is wrong: gradients of norm weights stay partial under SP."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from launch.verify import verify_layout  # noqa: E402
from llm.cluster.script import run_script  # noqa: E402
from llm.parallel.layers import TensorParallel  # noqa: E402

if __name__ == "__main__":
    TensorParallel.on_weight = lambda self, weight: weight
    run_script(verify_layout)
