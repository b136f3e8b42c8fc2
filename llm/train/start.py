"""Starts a run: opens its folder and its data, builds its engine, and loads the checkpoint that it resumes from.

All ranks together find everything that can be wrong with the request, before anything is trained.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock

from llm.checkpoint.reader import open_agreed
from llm.config import RunConfig
from llm.config.parse import to_yaml
from llm.config.phases import consumed_samples
from llm.data.corpora import Corpora
from llm.data.loader import open_loader, validation_batches
from llm.parallel.agreement import broadcast, together
from llm.parallel.mesh import Mesh
from llm.train.build import build_engine
from llm.train.checks import check_kernels, check_tokenizer
from llm.train.engines.base import Engine, MicroBatch, micro_batch
from llm.train.feed import Feed
from llm.train.init_from import open_weights
from llm.train.resume import check_resumable, find_step, resume_report, saved_config
from llm.train.run_folder import RunFolder, truncate_metrics

RUNS = Path("runs")


@dataclass
class Run:
    """A run on this rank, ready to train from `step`."""

    config: RunConfig
    folder: RunFolder
    corpora: Corpora
    mesh: Mesh
    device: torch.device
    step: int
    """Steps that are done."""
    feed: Feed | None = None
    engine: Engine | None = None
    """Both None when nothing is left to do."""

    @property
    def lead(self) -> bool:
        """Whether this is the rank that reports."""
        return self.mesh.rank == 0

    def validation_batches(self) -> Iterator[MicroBatch]:
        """This rank's share of the validation samples. Raises InputError at once where the split cannot be used."""
        batches = validation_batches(self.corpora, dp_rank=self.mesh.dp_rank, dp_size=self.mesh.dp_size)
        return (micro_batch(batch, self.device, rows) for batch, rows in batches)


def claim(config: RunConfig) -> tuple[RunFolder, FileLock]:
    """Rank 0, before the ranks meet: make the run's folder and lock it. InputError if another process holds it."""
    folder = RunFolder(RUNS, config.name)
    folder.create()
    return folder, folder.lock()


def start(config: RunConfig, device: torch.device, say: Callable[[str], None]) -> Run:
    """Check, open the data, resume. Whatever is wrong with the request raises Agreed on every rank. Collective."""
    mesh = Mesh.create(config.parallel, device.type)
    folder, lead = RunFolder(RUNS, config.name), mesh.rank == 0
    forms = together(lambda: check_kernels(config, device))
    say(f"kernels on {device.type} (train.impl={config.train.impl}): {forms}")
    nonce = broadcast(together(lambda: folder.share_nonce() if lead else ""))
    together(lambda: folder.check_nonce(nonce))
    corpora = together(lambda: Corpora.open(config, say))
    checkpoint, warnings = open_agreed(folder.checkpoints, partial(find_step, step=config.checkpoint.resume_step))
    for warning in warnings:
        say(f"warning: {warning}")
    step = skipped_samples = 0
    weights = None
    if checkpoint is not None:
        corpora = together(lambda: check_resumable(config, corpora, checkpoint.state))
        step, skipped_samples = checkpoint.state["step"], checkpoint.state["skipped_samples"]
    elif config.train.init_from is not None:
        weights = open_weights(config, corpora.folder / "tokenizer.json", say)
    run = Run(config, folder, corpora, mesh, device, step)
    if step == config.train.max_steps:
        return run
    say(f"vocabulary: {together(lambda: check_tokenizer(corpora))}")
    together(run.validation_batches)
    run.feed = together(lambda: _open_feed(run, skipped_samples))
    together(lambda: _write_folder(run) if lead else None)
    run.engine = build_engine(config, mesh, device, checkpoint or weights)
    if checkpoint is not None:
        say(resume_report(saved_config(checkpoint.state), config, step))
    return run


def _open_feed(run: Run, skipped_samples: int) -> Feed:
    mesh, consumed = run.mesh, consumed_samples(run.config.phases, run.step)
    ranks = {"dp_rank": mesh.dp_rank, "dp_size": mesh.dp_size}
    loader = open_loader(run.corpora, **ranks, consumed=consumed, widen=run.device.type == "cpu")
    steps, hash_check = run.config.train.max_steps - run.step, run.corpora.hash_check(**ranks)
    return Feed(loader, run.device, steps, mesh.dp_group, hash_check=hash_check, skipped_samples=skipped_samples)


def _write_folder(run: Run) -> None:
    run.folder.config.write_text(to_yaml(run.config))
    shutil.copyfile(run.corpora.folder / "tokenizer.json", run.folder.path / "tokenizer.json")
    truncate_metrics(run.folder.metrics, run.step)
