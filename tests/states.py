"""A state.json for tests that look at other things."""

from __future__ import annotations

from typing import Any


def state_of(step: int, **fields: Any) -> dict[str, Any]:
    """That of a run after `step` steps, but for `fields`."""
    counts = {"step": step, "consumed_samples": step, "skipped_samples": 0}
    return counts | {"config": {}, "data": {}, "engine": {"optimizer_step": step, "loss_scale": None}} | fields
