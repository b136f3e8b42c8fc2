"""Where a run stops when one of two ranks is asked to: at each vote of a run, and what the next start does then."""

from __future__ import annotations

import json
import math
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from chosen import slow_but
from llm.cluster.signals import Stop
from llm.config import RunConfig
from llm.errors import Stopped
from pool import RankPool
from test_train_loop import config, lines, trained
from tiny_run import plain

# A vote after each step, each batch of a validation (of one batch) and each save; both come after every second step.
VOTES = [
    *(("step 1", 1, False), ("step 2", 2, True), ("validation", 2, True), ("save", 2, False), ("step 3", 3, False)),
    *(("step 4", 4, True), ("validation", 4, True), ("save", 4, False), ("step 5", 5, False)),
]


class Asked(Stop):
    """Asked on rank 1, from its vote of this number on."""

    def __init__(self, vote: int) -> None:
        super().__init__()
        self.votes_left = vote if dist.get_rank() == 1 else math.inf

    def asked(self) -> int:
        self.votes_left -= 1
        return int(signal.SIGUSR1) if self.votes_left < 0 else 0


def finished(config: RunConfig, root: Path, vote: int) -> bool:
    """Whether the run, asked at that vote, ended by itself."""
    with suppress(Stopped):
        return trained(config, root, stop=Asked(vote))
    return False


def numbers(root: Path) -> list[Any]:
    return [{key: line.get(key) for key in ("step", "loss", "grad_norm", "val_loss")} for line in lines(root)]


def settings() -> RunConfig:
    return plain(config(train=dict(eval_interval=2)), micro_batch_size=2)


@pytest.fixture(scope="module")
def whole(two_ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    two_ranks.run(trained, settings(), root)
    return root


@pytest.mark.parametrize("vote", slow_but([0, 2, 3, 6], range(len(VOTES))), ids=lambda vote: VOTES[vote][0])
def test_a_stopped_run_goes_on_as_the_whole_one(vote: int, whole: Path, two_ranks: RankPool, tmp_path: Path) -> None:
    _, step, due = VOTES[vote]
    assert two_ranks.run(finished, settings(), tmp_path, vote) == [False, False]
    stopped = json.loads((tmp_path / "run/stopped.json").read_text())
    assert (stopped["reason"], stopped["step"]) == ("SIGUSR1", step)
    saved = sorted((tmp_path / "run/checkpoints").glob("step-*"))
    assert saved[-1].name == f"step-{step:08}"
    assert json.loads((saved[-1] / "state.json").read_text()).get("validation_due", False) == due
    assert [line["step"] for line in lines(tmp_path) if "loss" in line] == list(range(1, step + 1))
    two_ranks.run(trained, settings(), tmp_path, step)
    assert numbers(tmp_path) == numbers(whole)


def test_after_its_last_step_a_run_finishes(whole: Path, two_ranks: RankPool, tmp_path: Path) -> None:
    assert two_ranks.run(finished, settings(), tmp_path, len(VOTES)) == [True, True]
    assert numbers(tmp_path) == numbers(whole)
    assert not (tmp_path / "run/stopped.json").exists()
