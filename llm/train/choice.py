"""Chooses the form of each operation of a run: what train.impl says, or on a GPU what is fastest there.

What was measured is kept in the run's folder, for when it goes on, and in the user's cache, for other runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
import triton

import kernels
from llm import files
from llm.config import RunConfig
from llm.errors import CheckpointError, InputError, ReadError, require
from llm.model.forms import Forms
from llm.parallel.agreement import broadcast, together
from llm.parallel.mesh import Mesh
from llm.train.contest import FORMS, Times, candidates, fastest, measure
from llm.typed import read

Say = Callable[[str], None]


class Record(NamedTuple):
    """A file of measured times, and of what machine, versions and shapes they are."""

    key: dict[str, str]
    ms: Times


def forms_of(config: RunConfig, mesh: Mesh, device: torch.device, kept: Path, say: Say) -> tuple[Forms, Record | None]:
    """The forms of this run, the same on every rank, and on rank 0 the times that they were chosen by. Collective.

    Rank 0 measures, if it must, on its GPU. kept: the run's file, which is read here, and which the caller writes.
    """
    forms = Forms.of(config.train.impl)._replace(deterministic=config.train.deterministic)
    if device.type == "cpu" or config.train.impl != "auto":
        return forms, None
    record = together(lambda: find(config, mesh.tp_size, mesh.dp_size, device, kept, say) if mesh.rank == 0 else None)
    return forms._replace(**json.loads(broadcast(json.dumps(fastest(record.ms) if record else {})))), record


def find(config: RunConfig, tp: int, dp: int, device: torch.device, kept: Path, say: Say) -> Record:
    """What was measured for this run, or one like it, or is now; says which, and keeps it for other runs."""
    key, record = key_of(config, tp, dp, device), None
    cached = Path.home() / f".cache/ingot/forms/{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
    for path in (kept, cached):
        try:
            if record is None and path.exists():
                record, source = load(path, key), f"as {path} says"
        except (CheckpointError, InputError, ReadError) as error:
            say(f"kernels are chosen anew: {error}")
    if record is None:
        ms, failures = measure(config, tp, dp, device)
        record, source = Record(key, ms), "as measured"
        for failure in failures:
            say(f"warning: {failure}")
        try:
            cached.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with files.complete_file(cached) as file:  # of several writers the last one's stays
                file.write(json.dumps(record._asdict(), indent=1).encode())
        except OSError as error:
            say(f"warning: what was measured is not kept for other runs: {error}")
    times = {op: ", ".join(f"{form} {ms:.3f} ms" for form, ms in found.items()) for op, found in record.ms.items()}
    say(f"kernels {source}: {'; '.join(f'{op} {found}' for op, found in times.items())}")
    return record


def key_of(config: RunConfig, tp: int, dp: int, device: torch.device) -> dict[str, str]:
    """All that the times depend on."""
    found, train = Path("/sys/module/nvidia/version"), config.train
    driver = found.read_text().strip() if found.exists() else "unknown"
    sources = sorted(Path(kernels.__path__[0]).rglob("*.py"))
    return {
        "GPU": torch.cuda.get_device_name(device),
        "versions": f"driver {driver}, torch {torch.__version__}, Triton {triton.__version__}",
        "kernels": hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16],
        **{f"model.{name}": str(value) for name, value in asdict(config.model).items()},
        "micro-batch": f"{train.micro_batch_size} x {[phase.seq_len for phase in config.phases]} in {train.precision}",
        "ranks": f"{tp} tensor-parallel, {dp} data-parallel, ZeRO {config.parallel.zero_stage}",
        "forms": str(candidates(config, device)),
    }


def load(path: Path, key: dict[str, str]) -> Record:
    """The record; raises CheckpointError or InputError if the file is damaged, InputError if it has another key."""
    record = read(Record, files.read_json(path), str(path))
    for op, times in record.ms.items():
        require(bool(times) and {*times} <= {*FORMS.get(op, ())}, f"{path} has times of {op} by {[*times]}; damaged")
    changed = [name for name in sorted({*key, *record.key}) if record.key.get(name) != key.get(name)]
    values = ", ".join(f"{name} {record.key.get(name)} -> {key.get(name)}" for name in changed)
    require(not changed, f"{path} was measured for another machine or shape: {values}")
    return record
