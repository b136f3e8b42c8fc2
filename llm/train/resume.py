"""Reads what a checkpoint says of its run (state.json), and decides whether a config can resume it."""

from __future__ import annotations

import json
from itertools import zip_longest
from operator import attrgetter
from typing import Any

from llm.config import RunConfig
from llm.config.parse import from_dict, to_dict
from llm.config.phases import Phase, consumed_samples
from llm.data.corpora import Corpora
from llm.errors import InputError, require

# What a restart may not change, beside the model, the phases that have begun and their data.
FIXED = ("seed", "data.seq_len", "data.packing", "data.document_masks")


def checkpoint_state(
    config: RunConfig, corpora: Corpora, step: int, skipped_samples: int, engine: dict[str, Any]
) -> dict[str, Any]:
    """state.json of a checkpoint after `step` steps; engine: its scalar_state."""
    return {
        "step": step,
        "consumed_samples": consumed_samples(config.phases, step),
        "skipped_samples": skipped_samples,
        "config": to_dict(config),
        "data": corpora.identity(),
        "engine": engine,
    }


def check_resumable(config: RunConfig, corpora: Corpora, state: dict[str, Any]) -> None:
    """Raise InputError if the run of this checkpoint cannot go on under `config`; the same on every rank."""
    saved = from_dict(state["config"])  # a field that is younger than the checkpoint has its default
    check_same_model(to_dict(saved)["model"], to_dict(config)["model"])
    for key in FIXED:
        before, now = map(attrgetter(key), (saved, config))
        require(
            before == now,
            f"runs/{config.name} was trained with {key} {before}, the config has {now}; "
            "restore it, or choose another --name",
        )
    _check_phases(config, saved, corpora, state)
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


def check_same_model(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raise InputError, naming each field that differs, unless the `model` configs are equal."""
    # Through JSON, as the saved one went: a tuple is a list.
    current = json.loads(json.dumps(current))
    missing = "no such field"
    lines = [
        f"model.{field}: the checkpoint has {saved.get(field, missing)}, the config has {current.get(field, missing)}"
        for field in dict.fromkeys([*current, *saved])
        if saved.get(field, missing) != current.get(field, missing)
    ]
    if lines:
        raise InputError(
            "the checkpoint is of another model; restore these settings or choose another --name"
            + "".join(f"\n  {line}" for line in lines)
        )


def _check_phases(config: RunConfig, saved: RunConfig, corpora: Corpora, state: dict[str, Any]) -> None:
    """Raise InputError unless the phases that have begun, and the data they draw from, are as they were."""
    started, saved_phases = (_started_phases(each, state["consumed_samples"]) for each in (config, saved))
    for before, now in zip_longest(saved_phases, started):
        require(
            before == now,
            f"runs/{config.name} was trained with {_described(before)}, the config has {_described(now)}; restore it, "
            "or choose another --name (phases that have not begun may change)",
        )
    data = corpora.identity(len(started))
    changed = [name for name in data if state["data"].get(name) != data[name]]
    require(
        not changed,
        f"runs/{config.name} was trained on other data than there is now: {', '.join(changed)}; "
        "restore the data, or choose another --name",
    )


def _started_phases(config: RunConfig, consumed: int) -> tuple[Phase, ...]:
    """The phases of which samples were among the first `consumed`, the first in any case: the others may change."""
    return tuple(phase for phase in config.phases if phase.first_sample == 0 or phase.first_sample < consumed)


def _described(phase: Phase | None) -> str:
    if phase is None:
        return "no such phase"
    return (
        f"data.seq_len {phase.seq_len}, train.global_batch_size {phase.global_batch_size}, data.blend {phase.blend} "
        f"from sample {phase.first_sample}"
    )
