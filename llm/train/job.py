"""A run on this rank, from the meeting of the ranks to its end: what the scripts that train have in common."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from filelock import FileLock

from llm.cluster.ranks import Ranks, choose_device, initialize
from llm.cluster.signals import Stop
from llm.config import RunConfig
from llm.train.loop import train
from llm.train.run_folder import RUNS, RunFolder
from llm.train.source import Pretraining, Say, Source
from llm.train.start import start


def run_job(
    config: RunConfig,
    ranks: Ranks,
    stop: Stop,
    *,
    prepare: bool = False,
    open_source: Callable[[RunConfig, Say], Source] = Pretraining.open,
) -> FileLock | None:
    """Train to the end; returns what holds the lock of the run's folder, on rank 0. Raises as `start` and `train`."""
    folder, lead = RunFolder(RUNS, config.name), ranks.rank == 0
    device = choose_device(ranks)
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks.local_world_size))
    lock, say = folder.claim() if lead else None, print if lead else lambda text: None
    with folder.undone_on_failure(folder.nonce() if lead else ""):
        initialize(ranks, timeout_seconds=config.parallel.timeout_seconds, device=device)
        run = start(config, device, say, ranks, prepare=prepare, stop=stop, open_source=open_source)
    if run is None:
        early = "" if config.finetune.patience is None else " or finetune.patience"
        steps = f"{config.train.max_steps} steps"
        say(f"{folder.path} is complete: {steps}; raise train.max_steps{early}, or choose another --name")
    else:
        train(run)
        run.engine.close()
    torch.distributed.destroy_process_group()
    return lock
