"""Bringing a run up: its folder, its data, its engine, and the checkpoint it goes on from.

Everything that can be wrong with the request is found here, by every rank together, before anything is trained.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llm.checkpoint.reader import check_same_model, open_latest
from llm.checkpoint.run_folder import RunFolder, RunLock, truncate_metrics
from llm.config import RunConfig, check_world, require
from llm.config_cli import to_dict, to_yaml
from llm.data.folder import data_folder, load_manifest
from llm.data.manifest import Manifest
from llm.parallel.agreement import broadcast, exchange_errors, together
from llm.parallel.mesh import Mesh
from llm.train.build import build_engine, build_model, check_kernels
from llm.train.engines.base import Engine

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
    engine: Engine | None
    """None when nothing is left to do."""
    lock: RunLock | None
    """Rank 0 holds it for as long as the process lives."""

    @property
    def lead(self) -> bool:
        """Whether this is the rank that reports."""
        return self.mesh.rank == 0


def start(config: RunConfig, device: torch.device, say: Callable[[str], None]) -> Run:
    """Check, lock, resume. Raises InputError on every rank alike. Collective."""
    mesh = Mesh.create(config.parallel, device.type)
    check_world(config, mesh.world_size)
    say(f"kernels on {device.type} (train.impl={config.train.impl}): {check_kernels(config, device)}")
    folder, lead = RunFolder(Path("runs"), config.name), mesh.rank == 0
    lock = together(lambda: _claim(folder) if lead else None)
    nonce = broadcast(folder.share_nonce() if lead else "")
    together(lambda: folder.check_nonce(nonce))
    manifest = together(lambda: load_manifest(config))
    reader, warnings = open_latest(
        folder.checkpoints,
        rank=mesh.rank,
        broadcast_text=broadcast,
        exchange_errors=exchange_errors,
    )
    for warning in warnings:
        say(f"warning: {warning}")
    step = 0
    if reader is not None:
        _check_resumable(config, manifest, reader.state)
        step = reader.state["step"]
    run = Run(config, folder, manifest, mesh, device, step, None, lock)
    if step == config.train.max_steps:
        return run
    if lead:
        _write_folder(config, folder, step)
    run.engine = build_engine(config, build_model(config, mesh), mesh, device)
    if reader is not None:
        run.engine.load_scalar_state(reader.state["engine"])
        run.engine.load_pieces(reader, reader.state["engine"]["optimizer_step"])
        say(f"resumed from step {step} of {config.train.max_steps}")
    return run


def checkpoint_state(run: Run) -> dict[str, Any]:
    """state.json of a checkpoint after `run.step` steps."""
    assert run.engine is not None
    return {
        "step": run.step,
        "consumed_samples": run.step * run.config.train.global_batch_size,
        "config": to_dict(run.config),
        "data": {
            "source_sha256": run.manifest.source_sha256,
            "tokenizer_sha256": run.manifest.tokenizer_sha256,
        },
        "engine": run.engine.scalar_state(),
    }


def _claim(folder: RunFolder) -> RunLock:
    folder.create()
    return folder.lock()


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
        state["data"]["source_sha256"] == manifest.source_sha256
        and state["data"]["tokenizer_sha256"] == manifest.tokenizer_sha256,
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
