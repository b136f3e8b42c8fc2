"""The lowest validation loss of a run: its checkpoint is kept, and when none lower comes the run may end."""

from __future__ import annotations

from typing import Any, NamedTuple

from llm.config import RunConfig


class Best(NamedTuple):
    """The validation with the lowest loss so far; checkpoints keep it in state.json as `best`."""

    step: int
    loss: float
    since: int = 0
    """Validations made after it."""

    @classmethod
    def of(cls, state: dict[str, Any]) -> Best | None:
        """What a state.json says of it."""
        return cls(**state["best"]) if "best" in state else None

    def after(self, step: int, loss: float) -> Best:
        """What is best after one more validation."""
        return Best(step, loss) if loss < self.loss else self._replace(since=self.since + 1)


def is_over(config: RunConfig, step: int, best: Best | None) -> bool:
    """Whether a run is finished after `step` steps: by train.max_steps, or by finetune.patience."""
    patience = config.finetune.patience
    return step == config.train.max_steps or (patience is not None and best is not None and best.since >= patience)
