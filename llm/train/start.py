"""Bringing a run up: its folder, its data, its engine, and the checkpoint it goes on from.

Everything that can be wrong with the request is found here, by every rank together, before anything is trained.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llm.checkpoint.reader import CheckpointReader, check_same_model, open_latest
from llm.checkpoint.run_folder import RunFolder, RunLock, truncate_metrics
from llm.config import RunConfig
from llm.config_cli import to_dict, to_yaml
from llm.data.folder import data_folder, load_manifest
from llm.data.loader import Batch, Loader, open_loader, validation_batches
from llm.data.manifest import Manifest
from llm.data.tokenizer import Tokenizer
from llm.errors import Agreed, InputError, require
from llm.parallel.agreement import broadcast, exchange_errors, together
from llm.parallel.mesh import Mesh
from llm.train.build import build_engine, check_kernels
from llm.train.engines.base import Engine

RUNS = Path("runs")
# What a restart may not change: beside the model, the order and content of the data.
FIXED = (("seed",), ("data", "seq_len"))


@dataclass
class Run:
    """A run on this rank, ready to train from `step`."""

    config: RunConfig
    folder: RunFolder
    manifest: Manifest
    mesh: Mesh
    device: torch.device
    step: int
    """Steps that are done."""
    loader: Loader | None = None
    engine: Engine | None = None
    """Both None when nothing is left to do."""

    @property
    def lead(self) -> bool:
        """Whether this is the rank that reports."""
        return self.mesh.rank == 0

    def validation_batches(self) -> Iterator[tuple[Batch, int]]:
        """This rank's share of the validation samples, and how many rows of each batch count."""
        return validation_batches(self.config, self.manifest, dp_rank=self.mesh.dp_rank, dp_size=self.mesh.dp_size)


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
    manifest = together(lambda: load_manifest(config))
    reader = _find_checkpoint(folder, mesh, say)
    state = reader.state if reader is not None else None
    if state is not None:
        together(lambda: _check_resumable(config, manifest, state))
    step = state["step"] if state is not None else 0
    run = Run(config, folder, manifest, mesh, device, step)
    if step == config.train.max_steps:
        return run
    together(lambda: _open_data(run))
    together(lambda: _write_folder(config, folder, step) if lead else None)
    run.engine = build_engine(config, mesh, device, reader)
    if reader is not None:
        say(f"resumed from step {step} of {config.train.max_steps}")
    return run


def _find_checkpoint(folder: RunFolder, mesh: Mesh, say: Callable[[str], None]) -> CheckpointReader | None:
    try:
        reader, warnings = open_latest(
            folder.checkpoints, rank=mesh.rank, broadcast_text=broadcast, exchange_errors=exchange_errors
        )
    except InputError as error:
        raise Agreed(str(error)) from error
    for warning in warnings:
        say(f"warning: {warning}")
    return reader


def _open_data(run: Run) -> None:
    """Open both splits, and see that the closing sample can be drawn, before anything is allocated."""
    config, mesh = run.config, run.mesh
    run.validation_batches()
    prompt = Tokenizer.load(data_folder(config) / "tokenizer.json").encode(config.logging.sample_prompt)
    require(
        config.logging.sample_tokens == 0 or 0 < len(prompt) < config.model.max_seq_len,
        f"logging.sample_prompt has {len(prompt)} tokens; expected at least 1 and fewer than model.max_seq_len "
        f"({config.model.max_seq_len}), or logging.sample_tokens=0",
    )
    consumed = run.step * config.train.global_batch_size
    run.loader = open_loader(config, run.manifest, dp_rank=mesh.dp_rank, dp_size=mesh.dp_size, consumed=consumed)


def checkpoint_state(run: Run) -> dict[str, Any]:
    """state.json of a checkpoint after `run.step` steps."""
    assert run.engine is not None
    return {
        "step": run.step,
        "consumed_samples": run.step * run.config.train.global_batch_size,
        "config": to_dict(run.config),
        "data": data_sha256(run.manifest),
        "engine": run.engine.scalar_state(),
    }


def data_sha256(manifest: Manifest) -> dict[str, str]:
    """What tells training data apart: the tokens, and the tokenizer that gives them meaning."""
    return {name: manifest.files[name].sha256 for name in ("train.bin", "train.idx", "tokenizer.json")}


def _check_resumable(config: RunConfig, manifest: Manifest, state: dict[str, Any]) -> None:
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
    require(
        state["data"] == data_sha256(manifest),
        f"runs/{config.name} was trained on other data than {data_folder(config)} holds; "
        "restore the data, or choose another --name",
    )
    batch = config.train.global_batch_size
    require(
        state["consumed_samples"] == state["step"] * batch,
        f"runs/{config.name} was trained with another train.global_batch_size than {batch}; "
        "restore it, or choose another --name",
    )
    step = state["step"]
    require(
        step <= config.train.max_steps,
        f"runs/{config.name} has done {step} steps, beyond train.max_steps {config.train.max_steps}; "
        "raise it, or choose another --name",
    )


def _write_folder(config: RunConfig, folder: RunFolder, step: int) -> None:
    folder.config.write_text(to_yaml(config))
    shutil.copyfile(data_folder(config) / "tokenizer.json", folder.path / "tokenizer.json")
    truncate_metrics(folder.metrics, step)
