"""launch/pretrain.py on a machine whose memory fails: after step 6, rank 1 finds one bit of one weight flipped."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch  # noqa: E402

from launch.pretrain import pretrain  # noqa: E402
from llm.cluster.script import run_script  # noqa: E402
from llm.cluster.signals import Stop  # noqa: E402
from llm.train.loop import Trainer  # noqa: E402

healthy_step = Trainer.step


def step(self: Trainer) -> Any:
    result = healthy_step(self)
    if self.run.step == 6 and self.run.mesh.rank == 1:
        self.engine.local_weight("blocks.0.norm_1.weight").view(-1)[:1].view(torch.int32).bitwise_xor_(1)
    return result


if __name__ == "__main__":
    Trainer.step = step
    run_script(pretrain, Stop())
