"""What state.json may hold, checked as it is read: the run that goes on from it trusts every number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from llm.errors import CheckpointError, InputError, require
from llm.typed import read


class _Scale(NamedTuple):
    scale: float
    remaining: int
    good_steps: int


class _Engine(NamedTuple):
    optimizer_step: int
    loss_scale: _Scale | None


class _Best(NamedTuple):
    step: int
    loss: float
    since: int = 0


class _Setbacks(NamedTuple):
    in_a_row: int = 0
    patience: int | None = None
    passed_samples: tuple[tuple[int, int], ...] = ()
    recent: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())


class _State(NamedTuple):
    """By the names of the file. What has a default is not in one of version 0.1.0."""

    step: int
    consumed_samples: int
    skipped_samples: int
    config: dict[str, Any]
    data: dict[str, str | tuple[str, ...] | dict[str, Any]]
    engine: _Engine
    setbacks: _Setbacks = _Setbacks()
    validation_due: bool = False
    best: _Best | None = None


def check_state(state: dict[str, Any], step: int) -> None:
    """Raise CheckpointError unless `state` is a state.json of a checkpoint whose manifest says `step`."""
    try:
        found = read(_State, state, "")
        require(found.step == step, f"step is {found.step}; the manifest's is {step}")
        counts = {key: value for key, value in found._asdict().items() if key not in ("config", "data")}
        for key, value in _integers(counts):
            require(value >= 0, f"{key} is {value}; expected at least 0")
        scale, ranges = found.engine.loss_scale, found.setbacks.passed_samples
        require(scale is None or scale.scale > 0, "engine.loss_scale.scale is not positive")
        ends = [0, *(end for each in ranges for end in each)]
        require(ends == sorted(ends), f"setbacks.passed_samples do not rise: {ranges[:4]}")
        if found.best is not None:
            require(found.best.step <= step, f"best.step is {found.best.step}, after step {step}")
    except InputError as error:
        advice = "resume from another checkpoint, or copy this one again"
        raise CheckpointError(f"state.json: {error}; {advice}") from error


def _integers(values: Any, where: str = "") -> list[tuple[str, int]]:
    """The integers below, each with its dotted key."""
    if hasattr(values, "_asdict"):
        values = values._asdict()
    if isinstance(values, Mapping | tuple):
        items = values.items() if isinstance(values, Mapping) else enumerate(values)
        return [found for key, item in items for found in _integers(item, f"{where}.{key}".lstrip("."))]
    return [(where, values)] if type(values) is int else []
