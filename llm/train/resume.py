"""Reads what a checkpoint says of its run (state.json), and decides whether a config can resume it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from operator import attrgetter
from typing import Any

from llm.config import RunConfig
from llm.config.parse import from_dict, to_dict
from llm.config.phases import Phase, consumed_samples
from llm.data.corpora import Corpora, Known, blends_of
from llm.data.identity import in_saved_order, known_corpora
from llm.data.samples.schedule import corpus_names
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


def check_resumable(config: RunConfig, corpora: Corpora, state: dict[str, Any]) -> Corpora:
    """The corpora in the checkpoint's order, the same on every rank; InputError if its run cannot go on so."""
    check_same_model(state["config"]["model"], to_dict(config)["model"])
    saved = from_dict(state["config"])
    for key in FIXED:
        before, now = map(attrgetter(key), (saved, config))
        require(
            before == now,
            f"runs/{config.name} was trained with {key} {before}, the config has {now}; "
            "restore it, or choose another --name",
        )
    corpora = _check_phases(config, saved, corpora, state)
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
    return corpora


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


def _check_phases(config: RunConfig, saved: RunConfig, corpora: Corpora, state: dict[str, Any]) -> Corpora:
    """The corpora in the checkpoint's order; InputError unless the phases that have begun are its own, data and all."""
    known = known_corpora(saved, state["data"])
    corpora = in_saved_order(corpora, saved, known)
    here = {first_name: name for name, first_name in corpora.first_names.items()}
    now_called = {old.name: here.get(first_name, f"{old.name} (gone)") for first_name, old in known.items()}
    blends = [{now_called[name]: weight for name, weight in blend.items()} for blend in blends_of(saved)]
    saved_phases = _started_phases(saved, blends, state["consumed_samples"])
    started = _started_phases(config, corpora.blends, state["consumed_samples"])
    changed = [] if state["data"]["tokenizer"] == corpora.manifest.tokenizer_sha256 else ["tokenizer.json"]
    for name in corpus_names(corpora.blends[: len(started)]):
        old = known.get(corpora.first_names[name], Known(name, "", {}))
        plans = corpora.known(name, len(started)).plans.items()
        if not (corpora.training[name].is_known_as(old.digest) and plans <= old.plans.items()):
            changed.append(name)
    others = f"what {', '.join(changed)} holds is not what runs/{config.name} was trained on" if changed else ""
    for before, now in zip_longest(saved_phases, started):
        require(
            before == now,
            f"runs/{config.name} was trained with {_described(before)}, the config has {_described(now)}; restore it, "
            f"or choose another --name (phases that have not begun may change){others and '; ' + others}",
        )
    require(not changed, f"{others}; restore the data, or choose another --name")
    return corpora


def _started_phases(config: RunConfig, blends: Sequence[dict[str, float]], consumed: int) -> tuple[Phase, ...]:
    """The phases of which samples were among the first `consumed`, the first in any case: the others may change."""
    phases = (replace(phase, blend=blend) for phase, blend in zip(config.phases, blends, strict=True))
    return tuple(phase for phase in phases if phase.first_sample == 0 or phase.first_sample < consumed)


def _described(phase: Phase | None) -> str:
    if phase is None:
        return "no such phase"
    return (
        f"data.seq_len {phase.seq_len}, train.global_batch_size {phase.global_batch_size}, data.blend {phase.blend} "
        f"from sample {phase.first_sample}"
    )
