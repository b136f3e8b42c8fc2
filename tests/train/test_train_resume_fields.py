"""Each field of the config, changed between two starts of a run: refused, or listed. None changes a run in silence."""

from __future__ import annotations

import types
from dataclasses import replace
from operator import attrgetter
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from llm.config import RunConfig
from llm.config.parse import dotted_keys
from llm.errors import InputError
from llm.train.resume import check_resumable, resume_report, saved_config
from test_train_resume import DIGESTS, config, opened, saved

# Values that their field's type does not suggest.
OTHERS: dict[str, Any] = {
    "data.blend": {"a": 2.0, "c": 1.0},
    "data.phases": (),
    "model.attention_window": 8,
    "model.attention_sparse": None,  # needs samples of a block or more: below
    "model.n_kv_head": 4,
    "optim.lr": 2e-3,
    "optim.betas": (0.8, 0.9),
    "lora.targets": ("qkv",),
    "profile.steps": (1, 2),
    "deepspeed": {"zero_optimization": {"contiguous_gradients": False}},
    "train.stall_seconds": 20,
    "optim.decay_fraction": 0.5,
}
# What another name resumes is another run.
NO_EFFECT = {"name", "model.attention_sparse"}


def other(key: str) -> Any:
    """A value of a field's type that it does not have."""
    if key in OTHERS:
        return OTHERS[key]
    section, _, field = key.rpartition(".")
    now = attrgetter(key)(config())
    hint = get_type_hints(type(attrgetter(section)(config()) if section else config()))[field]
    kinds = [kind for kind in get_args(hint) if kind is not type(None)] if is_union(hint) else [hint]
    kind = kinds[0]
    if get_origin(kind) is Literal:
        return next(value for value in get_args(kind) if value != now)
    if kind is bool:
        return not now
    if kind is str:
        return f"{now}x"
    return (now or 0) + 1 if kind is int else (now or 0.5) / 2


def is_union(hint: Any) -> bool:
    return get_origin(hint) is types.UnionType or str(get_origin(hint)) == "typing.Union"


def changed(key: str, value: Any) -> RunConfig:
    section, _, field = key.rpartition(".")
    if not section:
        return replace(config(), **{field: value})
    return replace(config(), **{section: replace(attrgetter(section)(config()), **{field: value})})


def outcome(key: str, value: Any) -> str:
    state = saved(3, config())
    try:
        after = changed(key, value)
        check_resumable(after, opened(after, DIGESTS), state)
    except InputError:
        return "refused"
    return "listed" if f"\n  {key} " in resume_report(saved_config(state), after, 3) else "silent"


@pytest.mark.parametrize("key", dotted_keys(RunConfig))
def test_a_field_that_changes_is_refused_or_listed(key: str) -> None:
    if key not in NO_EFFECT:
        assert other(key) != attrgetter(key)(config())
        assert outcome(key, other(key)) in ("refused", "listed")


@pytest.mark.parametrize(
    "key", ["seed", "model.n_layer", "model.norm_eps", "data.seq_len", "data.packing", "data.blend"]
)
def test_what_the_weights_or_the_samples_rest_on_is_refused(key: str) -> None:
    assert outcome(key, other(key)) == "refused"


@pytest.mark.parametrize("key", ["optim.lr", "train.spike_sigmas", "parallel.zero_stage", "checkpoint.keep_last"])
def test_what_may_change_is_listed(key: str) -> None:
    assert outcome(key, other(key)) == "listed"
