"""Starts a run: opens its folder and its data, builds its engine, and loads the checkpoint that it resumes from.

All ranks together find everything that can be wrong with the request, before anything is trained.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TextIO

import torch
import torch.distributed as dist

from llm.checkpoint.reader import CheckpointReader, open_agreed
from llm.checkpoint.remote import Remote, find_or_fetch
from llm.cluster.heartbeat import Heartbeat, connect
from llm.cluster.ranks import Ranks
from llm.cluster.signals import Stop
from llm.config import RunConfig
from llm.config.parse import to_yaml
from llm.config.phases import consumed_samples
from llm.data.corpora import unprepared
from llm.data.prepare.console import prepare_all
from llm.errors import Stopped
from llm.files import replace, write_json
from llm.model.forms import Forms
from llm.parallel.agreement import broadcast, exchange, lead_first, together
from llm.parallel.mesh import Mesh
from llm.train.ballot import Ballot
from llm.train.best import Best, is_over
from llm.train.build import build_engine
from llm.train.checks import check_kernels
from llm.train.choice import forms_of
from llm.train.engines.base import Engine, MicroBatch, micro_batch
from llm.train.engines.deepspeed_log import divert
from llm.train.feed import Feed
from llm.train.resume import check_settings, find_step, resume_report, saved_config
from llm.train.run_folder import RUNS, RunFolder, truncate_metrics
from llm.train.source import Pretraining, Say, Source
from llm.train.wandb_run import check_wandb


@dataclass
class Run:
    """A run on this rank, ready to train from `step`."""

    config: RunConfig
    folder: RunFolder
    source: Source
    mesh: Mesh
    device: torch.device
    step: int
    """Steps that are done."""
    feed: Feed
    engine: Engine
    ballot: Ballot = field(default_factory=Ballot)
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    validation_due: bool = False
    """That after `step` was left for a stop, or is the first of a fine-tuning run."""
    best: Best | None = None
    resumed: dict[str, Any] = field(default_factory=dict)
    """state.json of the checkpoint that it resumed from; empty for a new run."""

    @property
    def lead(self) -> bool:
        """Whether this is the rank that reports."""
        return self.mesh.rank == 0

    @property
    def over(self) -> bool:
        return is_over(self.config, self.step, self.best)

    def validation_batches(self) -> Iterator[MicroBatch]:
        """This rank's share of the validation samples. Raises InputError at once where the split cannot be used."""
        batches = self.source.validation_batches(dp_rank=self.mesh.dp_rank, dp_size=self.mesh.dp_size)
        return (micro_batch(batch, self.device, rows) for batch, rows in batches)


def start(
    config: RunConfig,
    device: torch.device,
    say: Callable[[str], None],
    ranks: Ranks | None = None,
    *,
    prepare: bool = False,
    stop: Stop | None = None,
    open_source: Callable[[RunConfig, Say], Source] = Pretraining.open,
) -> Run | None:
    """Check, open the data, resume; None when every step is done, for which no data is needed. Collective.

    ranks: where they have met; None for a run that is not watched. prepare: the data too, first, where that is not
    done. stop: raises Stopped between any two of these when a rank was asked, and is asked by the run as it trains.
    open_source: opens the data, on every rank.
    Whatever is wrong with the request raises Agreed on every rank, and then the run's folder is as rank 0 found it
    before `RunFolder.claim`.
    """
    mesh = Mesh.create(config.parallel, device.type)
    folder, lead = RunFolder(RUNS, config.name), mesh.rank == 0
    nonce = broadcast(together(lambda: folder.nonce() if lead else ""))
    with folder.undone_on_failure(nonce):
        together(lambda: folder.check_nonce(nonce))
        together(lambda: folder.forget_the_end() if lead else None)
        ballot = Ballot(stop, config.parallel.timeout_seconds)
        ballot.leave_if_asked(folder, None)
        together(lambda: check_wandb(config) if lead else None)
        together(lambda: check_kernels(config, device))
        forms, record = forms_of(config, mesh, device, folder.kernels, say)
        say(f"kernels on {device.type} (train.impl={config.train.impl}): {check_kernels(config, device, forms)}")
        find, wanted = partial(find_step, step=config.checkpoint.resume_step), config.checkpoint.resume_step
        if config.checkpoint.copy_to is not None:
            remote = together(lambda: Remote(config.checkpoint.copy_to or "", config.name))
            find = partial(find_or_fetch, remote=remote, find=find, wanted=wanted, say=say)
        checkpoint, warnings = open_agreed(folder.checkpoints, find)
        for warning in warnings:
            say(f"warning: {warning}")
        if checkpoint is not None:
            together(lambda: check_settings(config, checkpoint.state))
            if is_over(config, checkpoint.state["step"], Best.of(checkpoint.state)):
                return None
        step = None if checkpoint is None else checkpoint.state["step"]
        ballot.leave_if_asked(folder, step)
        if prepare:
            lead_first(lambda: _prepare(config, say, stop) if unprepared(config) else None)
            ballot.leave_if_asked(folder, step)
        run = _ready(config, folder, mesh, device, checkpoint, forms, say, open_source)
        run.ballot = ballot
        if ranks is not None:
            hosts = [name or "" for name in exchange(socket.gethostname())]
            run.heartbeat = together(lambda: _heartbeat(run, ranks, hosts, nonce))
        ballot.leave_if_asked(folder, step)
        together(lambda: write_json(folder.kernels, record._asdict()) if record is not None else None)
        return run


def _heartbeat(run: Run, ranks: Ranks, hosts: list[str], start: str) -> Heartbeat:
    """What watches the run's progress: the collectives of all its groups, and the micro-batches."""
    own = dist.group.WORLD, run.mesh.dp_group, run.mesh.tp_group, run.ballot.group
    groups = {group.group_name: group for group in own if group is not None}
    store = connect(ranks, start, run.config.parallel.timeout_seconds)
    return Heartbeat(
        run.config.train.stall_seconds, ranks.rank, hosts, store,
        groups=[*groups.values()], work=lambda: run.engine.forward_time.count + run.engine.pieces_read,
        failed=run.folder.failed,
    )  # fmt: skip


def _prepare(config: RunConfig, say: Callable[[str], None], stop: Stop | None) -> None:
    """Rank 0: prepare the data, or leave that when the stop is asked for."""

    def poll() -> None:
        if stop is not None and stop.asked():
            raise Stopped

    with suppress(Stopped):
        say(prepare_all(config, poll))


def _ready(
    config: RunConfig,
    folder: RunFolder,
    mesh: Mesh,
    device: torch.device,
    checkpoint: CheckpointReader | None,
    forms: Forms,
    say: Say,
    open_source: Callable[[RunConfig, Say], Source],
) -> Run:
    """The run, with its data open and its engine built. Only then its own files are written."""
    source = together(lambda: open_source(config, say))
    step = skipped_samples = 0
    weights = None
    if checkpoint is not None:
        source = together(lambda: source.resumed(checkpoint.state))
        step, skipped_samples = checkpoint.state["step"], checkpoint.state["skipped_samples"]
    elif config.train.init_from is not None:
        weights = source.weights(say)
    say(f"vocabulary: {together(source.describe)}")
    ranks = {"dp_rank": mesh.dp_rank, "dp_size": mesh.dp_size}
    together(lambda: source.validation_batches(**ranks))
    consumed = consumed_samples(config.phases, step)
    loader = together(lambda: source.loader(**ranks, consumed=consumed, widen=device.type == "cpu"))
    hash_check = together(lambda: source.hash_check(**ranks))
    for remark in together(lambda: source.remarks() if mesh.rank == 0 else []):
        say(remark)
    left = config.train.max_steps - step
    feed = Feed(loader, device, left, mesh.dp_group, hash_check=hash_check, skipped_samples=skipped_samples)
    with redirect_stdout(_engine_output(config, folder, mesh.rank, device, say)):
        engine = build_engine(config, mesh, device, checkpoint or weights, forms, source.build_model)
    run = Run(config, folder, source, mesh, device, step, feed, engine)
    run.validation_due = config.finetune.task != "none"
    if checkpoint is not None:
        run.validation_due, run.best = checkpoint.state.get("validation_due", False), Best.of(checkpoint.state)
        run.resumed = checkpoint.state
    together(lambda: _write_folder(run) if run.lead else None)
    if checkpoint is not None:
        say(resume_report(saved_config(checkpoint.state), config, step))
    return run


def _engine_output(
    config: RunConfig, folder: RunFolder, rank: int, device: torch.device, say: Callable[[str], None]
) -> TextIO:
    """Where what the engine prints goes while it is built. Collective."""
    if config.train.engine != "deepspeed":
        return sys.stdout
    log = folder.path / "deepspeed" / f"rank-{rank}.log"
    slow = "; its first start on a machine compiles for a minute or two" if device.type == "cpu" else ""
    say(f"DeepSpeed logs to {log.parent}{slow}")
    return together(lambda: divert(log))


def _write_folder(run: Run) -> None:
    replace(run.folder.config, to_yaml(run.config).encode())
    run.source.save(run.folder.path)
    truncate_metrics(run.folder.metrics, run.step)
