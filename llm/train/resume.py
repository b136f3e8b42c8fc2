"""Reads what a checkpoint says of its run (state.json), and decides whether a config can resume it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, replace
from itertools import zip_longest
from operator import attrgetter
from pathlib import Path
from typing import Any

from llm.checkpoint.manifest import Manifest
from llm.checkpoint.reader import find_latest, open_checkpoint, verify
from llm.checkpoint.writer import checkpoints, step_of
from llm.config import ModelConfig, RunConfig
from llm.config.parse import changed_fields, from_dict, to_dict
from llm.config.phases import Phase, consumed_samples
from llm.config.redact import hide, redacted
from llm.data.corpora import Corpora, Known, blends_of
from llm.data.identity import in_saved_order, known_corpora
from llm.data.samples.schedule import corpus_names
from llm.errors import CheckpointError, InputError, require
from llm.train.optim import learning_rate

# What a restart may not change, beside the model, the phases that have begun and their data.
FIXED = (
    "seed", "optim.name", "finetune.task", "lora.rank", "lora.alpha", "lora.targets",
    "data.seq_len", "data.packing", "data.document_masks",
)  # fmt: skip
# Fields of the model that do not say what its weights mean.
FREE = ("dropout", "init_std")
JUMP = 0.1  # relative change of the learning rate that is warned about


def checkpoint_state(
    config: RunConfig,
    data: dict[str, Any],
    step: int,
    skipped_samples: int,
    engine: dict[str, Any],
    setbacks: dict[str, Any],
) -> dict[str, Any]:
    """state.json of a checkpoint after `step` steps.

    data: their identity (Source); engine: its scalar_state; setbacks: of llm.train.rollback.
    """
    return {
        "step": step,
        "consumed_samples": consumed_samples(config.phases, step),
        "skipped_samples": skipped_samples,
        "config": kept_config(config),
        "data": data,
        "engine": engine,
        "setbacks": setbacks,
    }


def kept_config(config: RunConfig) -> dict[str, Any]:
    """The config as state.json keeps it: without secrets but in the names of corpora, whose order numbers them."""
    whole = to_dict(config)
    return redacted(whole) | {"data": whole["data"] | {"source": hide(config.data.source)}}


def find_step(
    root: Path, step: int | None, check: Callable[[Path], Manifest] = verify
) -> tuple[Path | None, list[str]]:
    """The whole checkpoint under `root` that checkpoint.resume_step = `step` asks for, and what to warn of.

    It is that of `step`, with None the newest. But where the newest was saved under the same resume_step, that one is
    taken: else a run that is started again and again would lose each time what it has done since.
    """
    if step is None:
        return find_latest(root, check=check)
    found = checkpoints(root)
    steps = ", ".join(str(each) for each in sorted({step_of(folder) for folder in found})) or "none"
    among = [folder for folder in found if step_of(folder) == step]
    later = [folder for folder in found if step_of(folder) > step]
    warning = f"when the run saves its next checkpoint, those beyond step {step} are put aside; there are {steps}"
    if next((back == step for back in map(_resume_step, later) if back is not None), False):
        among = later + among
        warning = f"the run went back to step {step} before and now goes on; to go back again, move later steps away"
    require(bool(among), f"checkpoint.resume_step is {step}; expected a step of a checkpoint in {root}: {steps}")
    folder, warnings = find_latest(root, among, check)
    return folder, [*warnings, warning] if later else warnings


def _resume_step(checkpoint: Path) -> int | None:
    """checkpoint.resume_step of the process that saved a checkpoint, 0 for none; None if it is damaged."""
    try:
        return saved_config(open_checkpoint(checkpoint).state).checkpoint.resume_step or 0
    except (CheckpointError, InputError):
        return None


def check_resumable(config: RunConfig, corpora: Corpora, state: dict[str, Any]) -> Corpora:
    """The corpora in the checkpoint's order, the same on every rank; InputError if its run cannot go on so."""
    corpora = _check_phases(config, check_settings(config, state), corpora, state)
    check_steps(config, state)
    return corpora


def check_steps(config: RunConfig, state: dict[str, Any]) -> None:
    """InputError unless the steps of a checkpoint are so many samples by `config` too, and not too many for it."""
    run = f"runs/{config.name}"
    step, taken, most = state["step"], state["consumed_samples"], config.train.max_steps
    consumed = consumed_samples(config.phases, step)
    found = f"{run} has taken {taken} samples in {step} steps, by the config they are {consumed}"
    require(taken == consumed, f"{found}; restore train.global_batch_size and data.phases, or choose another --name")
    found = f"{run} has done {step} steps, beyond train.max_steps {most}"
    require(step <= most, f"{found}; raise it, or choose another --name")


def check_settings(config: RunConfig, state: dict[str, Any]) -> RunConfig:
    """The config of a checkpoint; InputError unless `config` has its model and what else, beside data, stays fixed."""
    run, saved = f"runs/{config.name}", saved_config(state)
    require(state["data"] != {}, f"{run} is imported; train with --train.init_from={run} and another --name")
    check_same_model(saved.model, config.model)
    for key in FIXED:
        before, now = map(attrgetter(key), (saved, config))
        found = f"{run} was trained with {key} {before}, the config has {now}"
        require(before == now, f"{found}; restore it, or choose another --name")
    return saved


def saved_config(state: dict[str, Any]) -> RunConfig:
    """The config in a checkpoint's state.json: fields that its version did not have are at their defaults."""
    try:
        return from_dict(state["config"])
    except InputError as error:
        raise InputError(f"the checkpoint's config is not one of this version: {error}") from error


def resume_report(saved: RunConfig, config: RunConfig, step: int) -> str:
    """What to say when a run goes on after `step` steps: each field that changed, and how far the rate jumps."""
    kept = (from_dict(kept_config(each)) for each in (saved, config))
    changed = [hide(f"{key} {values}") for key, values in changed_fields(*kept).items()]
    lines = [f"resumed from step {step} of {config.train.max_steps}" + "; changed since:" * bool(changed), *changed]
    before, now = (learning_rate(each.optim, step, each.train.max_steps) for each in (saved, config))
    if abs(now - before) > JUMP * before:
        lines.append(f"warning: the learning rate of step {step + 1} was to be {before:.3g}, and now is {now:.3g}")
    if config.train.init_from is not None:
        lines.append("train.init_from is not read: the run has weights of its own")
    return "\n  ".join(lines)


def check_same_model(saved: ModelConfig, current: ModelConfig, but: Collection[str] = ()) -> None:
    """Raise InputError, naming each field that differs, unless weights of `saved` mean the same in `current`."""
    # What null stands for is not another model.
    before, now = (asdict(each) | {"n_kv_head": each.kv_heads, "d_ff": each.ff_dim} for each in (saved, current))
    lines = [
        f"\n  model.{field}: the checkpoint has {before[field]}, the config has {now[field]}"
        for field in now
        if before[field] != now[field] and field not in (*FREE, *but)
    ]
    advice = f"set model.* as the checkpoint has it, or choose another {'train.init_from' if but else '--name'}"
    require(not lines, f"the checkpoint is of another model; {advice}" + "".join(lines))


def _check_phases(config: RunConfig, saved: RunConfig, corpora: Corpora, state: dict[str, Any]) -> Corpora:
    """The corpora in the checkpoint's order; InputError unless the phases that have begun are its own, data and all."""
    known = known_corpora(saved, state["data"])
    corpora = in_saved_order(corpora, saved, known)
    here = {first_name: name for name, first_name in corpora.first_names.items()}
    now_called = {old.name: here.get(first_name, f"{old.name} (gone)") for first_name, old in known.items()}
    blends = [{now_called[name]: weight for name, weight in blend.items()} for blend in blends_of(saved)]
    saved_phases = _started_phases(saved, blends, state["consumed_samples"])
    started = _started_phases(config, corpora.blends, state["consumed_samples"])
    changed = [] if state["data"].get("tokenizer") == corpora.manifest.tokenizer_sha256 else ["tokenizer.json"]
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
