"""A run of a few steps that is profiled and leaves nothing else: what launch/profile_step.py starts."""

from __future__ import annotations

from pathlib import Path

import torch

from llm.cluster.ranks import Ranks
from llm.cluster.signals import Stop
from llm.config import RunConfig
from llm.errors import Stopped
from llm.train.loop import Trainer
from llm.train.profiling import Profiler
from llm.train.start import start


def take_profile(
    config: RunConfig, ranks: Ranks, device: torch.device, stop: Stop, folder: Path, *, prepare: bool
) -> None:
    """Train up to the step after profile.steps, which `config` has, and write the profile to `folder`. Collective.

    Raises Stopped when a stop was agreed on before that: nothing is saved.
    """
    say = print if ranks.rank == 0 else lambda text: None
    run = start(config, device, say, ranks, prepare=prepare, stop=stop)
    assert run is not None and config.profile.steps is not None, "a run of its own, with steps to profile"
    trainer = Trainer(run)
    profiler = Profiler(run, say, folder)
    with trainer.reporter.console, trainer.reporter.metrics:
        while run.step <= config.profile.steps[1]:
            profiler.step(trainer.step)
            if run.ballot.agreed:
                raise Stopped
    run.heartbeat.close()
    trainer.feed.close()
    run.engine.close()
    torch.distributed.destroy_process_group()
