"""The `finetune` section of a run's config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llm.config.sections import check_at_least
from llm.errors import require


@dataclass(frozen=True)
class FinetuneConfig:
    """What a run that goes on from train.init_from learns (docs/finetune.md)."""

    task: Literal["none", "continue", "chat", "classify"] = "none"
    """`continue`: more text; `chat`: the answers of conversations; `classify`: a label of a text; `none`: pretraining.
    A task keeps the checkpoint with the lowest validation loss."""
    patience: int | None = None
    """The run ends after so many validations in a row without a lower loss; null: after train.max_steps alone."""

    def __post_init__(self) -> None:
        check_at_least(1, "finetune.", self, "patience")
        require(
            self.patience is None or self.task != "none",
            f"finetune.patience is {self.patience} and finetune.task none; set finetune.task, or patience to null",
        )
