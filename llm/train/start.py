"""Bringing a run up: its folder, its data, its engine, and the checkpoint it goes on from.

Everything that can be wrong with the request is found here, by every rank together, before anything is trained.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from llm.checkpoint.reader import check_same_model, open_latest
from llm.config import RunConfig
from llm.config.parse import from_dict, to_dict, to_yaml
from llm.config.phases import Phase, consumed_samples
from llm.data.batch import Batch
from llm.data.corpora import Corpora
from llm.data.loader import Loader, open_loader, validation_batches
from llm.data.tokenizer import Tokenizer
from llm.data.tokens.hashes import HashCheck
from llm.errors import require
from llm.parallel.agreement import broadcast, together
from llm.parallel.mesh import Mesh
from llm.train.build import build_engine, check_kernels
from llm.train.engines.base import Engine
from llm.train.run_folder import RunFolder, RunLock, truncate_metrics

RUNS = Path("runs")
# What a restart may not change: beside the model and the phases that have begun, the order and content of the data.
FIXED = (("seed",), ("data", "seq_len"), ("data", "packing"), ("data", "document_masks"))


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
    skipped_samples: int = 0
    """Samples that could not be read and were replaced, over all ranks, as of the last report or checkpoint."""
    loader: Loader | None = None
    hash_check: HashCheck | None = None
    """None: data.verify is none."""
    engine: Engine | None = None
    """Loader and engine are None when nothing is left to do."""

    @property
    def lead(self) -> bool:
        """Whether this is the rank that reports."""
        return self.mesh.rank == 0

    def validation_batches(self) -> Iterator[tuple[Batch, int]]:
        """This rank's share of the validation samples, and how many rows of each batch count."""
        return validation_batches(self.corpora, dp_rank=self.mesh.dp_rank, dp_size=self.mesh.dp_size)


def claim(config: RunConfig) -> tuple[RunFolder, RunLock]:
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
    corpora = together(lambda: Corpora.open(config))
    reader, warnings = open_latest(folder.checkpoints)
    for warning in warnings:
        say(f"warning: {warning}")
    state = reader.state if reader is not None else None
    if state is not None:
        together(lambda: _check_resumable(config, corpora, state))
    step = state["step"] if state is not None else 0
    skipped_samples = state["skipped_samples"] if state is not None else 0
    run = Run(config, folder, corpora, mesh, device, step, skipped_samples)
    if step == config.train.max_steps:
        return run
    together(lambda: _open_data(run))
    together(lambda: _write_folder(run) if lead else None)
    run.engine = build_engine(config, mesh, device, reader)
    if reader is not None:
        say(f"resumed from step {step} of {config.train.max_steps}")
    return run


def _open_data(run: Run) -> None:
    """Open both splits, and see that the closing sample can be drawn, before anything is allocated."""
    config, mesh = run.config, run.mesh
    run.validation_batches()
    prompt = Tokenizer.load(run.corpora.folder / "tokenizer.json").encode(config.logging.sample_prompt)
    require(
        config.logging.sample_tokens == 0 or 0 < len(prompt) < config.model.max_seq_len,
        f"logging.sample_prompt has {len(prompt)} tokens; expected at least 1 and fewer than model.max_seq_len "
        f"({config.model.max_seq_len}), or logging.sample_tokens=0",
    )
    consumed = consumed_samples(config.phases, run.step)
    ranks = {"dp_rank": mesh.dp_rank, "dp_size": mesh.dp_size}
    run.loader = open_loader(run.corpora, **ranks, consumed=consumed, widen=run.device.type == "cpu")
    run.hash_check = run.corpora.hash_check(**ranks)


def checkpoint_state(run: Run) -> dict[str, Any]:
    """state.json of a checkpoint after `run.step` steps."""
    assert run.engine is not None
    return {
        "step": run.step,
        "consumed_samples": consumed_samples(run.config.phases, run.step),
        "skipped_samples": run.skipped_samples,
        "config": to_dict(run.config),
        "data": run.corpora.identity(),
        "engine": run.engine.scalar_state(),
    }


def _check_resumable(config: RunConfig, corpora: Corpora, state: dict[str, Any]) -> None:
    """Raise InputError if the run of this checkpoint cannot go on under `config`; the same on every rank."""
    saved, current = state["config"], to_dict(config)
    check_same_model(saved["model"], current["model"])
    for path in FIXED:
        before, now = saved, current
        for key in path:
            before, now = before[key], now[key]
        require(
            before == now,
            f"runs/{config.name} was trained with {'.'.join(path)} {before}, the config has {now}; "
            "restore it, or choose another --name",
        )
    _check_begun(begun(from_dict(saved), state), begun(config, state), corpora, state)
    step = state["step"]
    consumed = consumed_samples(config.phases, step)
    require(
        state["consumed_samples"] == consumed,
        f"runs/{config.name} has taken {state['consumed_samples']} samples in {step} steps, by the config they are "
        f"{consumed}; restore train.global_batch_size and data.phases, or choose another --name",
    )
    require(
        step <= config.train.max_steps,
        f"runs/{config.name} has done {step} steps, beyond train.max_steps {config.train.max_steps}; "
        "raise it, or choose another --name",
    )


def begun(config: RunConfig, state: dict[str, Any]) -> RunConfig:
    """The config without the phases of which no sample was taken when `state` was saved: these may still change."""
    kept = tuple(change for change in config.data.phases if change.samples < state["consumed_samples"])
    return replace(config, data=replace(config.data, phases=kept))


def _check_begun(before: RunConfig, now: RunConfig, corpora: Corpora, state: dict[str, Any]) -> None:
    """Raise InputError unless the phases that have begun, and the data they draw from, are as they were."""
    for was, found in zip_longest(before.phases, now.phases):
        require(
            was == found,
            f"runs/{now.name} was trained with {_described(was)}, the config has {_described(found)}; restore it, or "
            "choose another --name (phases that have not begun may change)",
        )
    data = corpora.identity(len(now.phases))
    changed = [name for name in data if state["data"].get(name) != data[name]]
    require(
        not changed,
        f"runs/{now.name} was trained on other data than there is now: {', '.join(changed)}; "
        "restore the data, or choose another --name",
    )


def _described(phase: Phase | None) -> str:
    if phase is None:
        return "no such phase"
    return (
        f"data.seq_len {phase.seq_len}, train.global_batch_size {phase.global_batch_size}, data.blend {phase.blend} "
        f"from sample {phase.first_sample}"
    )


def _write_folder(run: Run) -> None:
    run.folder.config.write_text(to_yaml(run.config))
    shutil.copyfile(run.corpora.folder / "tokenizer.json", run.folder.path / "tokenizer.json")
    truncate_metrics(run.folder.metrics, run.step)
