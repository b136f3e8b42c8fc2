"""A run of a few steps that is profiled and saves nothing: what launch/profile_step.py starts."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from llm.cluster.ranks import Ranks, initialize
from llm.cluster.signals import Stop
from llm.config import RunConfig
from llm.errors import Stopped
from llm.train.loop import Trainer
from llm.train.profiling import Profiler
from llm.train.run_folder import RUNS, RunFolder
from llm.train.start import start


def take_profile(
    config: RunConfig, ranks: Ranks, device: torch.device, stop: Stop, out: Path | None, *, prepare: bool
) -> Path:
    """Train up to the step after profile.steps, which `config` has; returns the profile's folder. Collective.

    out: that folder; None: the run's own. Raises Stopped when a stop was agreed on before, as nothing is saved.
    """
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks.local_world_size))
    folder = RunFolder(RUNS, config.name)
    say = print if ranks.rank == 0 else lambda text: None
    lock = folder.claim() if ranks.rank == 0 else None
    initialize(ranks, timeout_seconds=config.parallel.timeout_seconds, device=device)
    run = start(config, device, say, ranks, prepare=prepare, stop=stop)
    assert run is not None and config.profile.steps is not None, "a new run, with steps to profile"
    trainer = Trainer(run)
    profiler = Profiler(run, say, out or folder.path)
    with trainer.reporter.console, trainer.reporter.metrics:
        while run.step <= config.profile.steps[1]:
            profiler.step(trainer.step)
            if run.ballot.agreed:
                raise Stopped("before the profile was whole")
    run.heartbeat.close()
    trainer.feed.close()
    run.engine.close()
    torch.distributed.destroy_process_group()
    if lock is not None:
        lock.release()
    return out or folder.path
