"""launch/pretrain.py in which numbers go wrong on one rank, as FAULT says, such as "1 nan 60 62".

nan FIRST LAST: losses and gradients of the samples of these steps are not finite; loud FIRST LAST: 100 times as large.
gradient STEP: its first backward pass is a little wrong; clip STEP: from then on its gradients are not clipped.
exp_avg STEP, weights STEP: a bit of that state flips after the step.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from launch.pretrain import pretrain  # noqa: E402
from llm.cluster.script import run_script  # noqa: E402
from llm.cluster.signals import Stop  # noqa: E402
from llm.model.gpt import GPT  # noqa: E402
from llm.train.engines import masters  # noqa: E402
from llm.train.loop import Trainer  # noqa: E402

SAMPLES = 8  # of a step


class Fault:
    def __init__(self, kind: str, first: str, last: str = "0") -> None:
        self.kind, self.first, self.last, self.due = kind, int(first), int(last), False
        self.healthy = {"step": Trainer.step, "forward": GPT.forward}

    def step(self, trainer: Trainer) -> None:
        number = trainer.run.step + 1
        self.due = self.kind == "gradient" and number == self.first
        if self.kind == "clip" and number == self.first:
            masters.clip = lambda *_: None
        self.healthy["step"](trainer)
        if self.kind in ("exp_avg", "weights") and number == self.first:
            tensors = trainer.engine.optimizer_tensors()
            name = next(name for name in tensors if name.startswith(f"{self.kind} of"))
            tensors[name].view(-1)[:1].view(torch.int32).bitwise_xor_(1)

    def forward(self, model: GPT, tokens: Tensor, positions: Tensor, samples: Tensor, *others: Any) -> Tensor:
        output = self.healthy["forward"](model, tokens, positions, samples, *others)
        within = range(SAMPLES * (self.first - 1), SAMPLES * self.last)
        if model.training and any(sample in within for sample in samples.tolist()):
            output = output * {"nan": float("nan"), "loud": 100.0}[self.kind]
        if self.due and output.requires_grad:
            output.register_hook(lambda grad: grad * 1.01)
            self.due = False
        return output


def main() -> None:
    rank, *words = os.environ["FAULT"].split()
    if os.environ.get("RANK", "0") == rank:
        fault = Fault(*words)
        Trainer.step = lambda trainer: fault.step(trainer)
        GPT.forward = lambda model, *arguments, **options: fault.forward(model, *arguments, **options)
    run_script(pretrain, Stop())


if __name__ == "__main__":
    main()
