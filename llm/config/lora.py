"""The `lora` section of a run's config, and the names of what it adds to a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llm.config.sections import check_at_least
from llm.errors import require

# A [rank, in] and B [out, rank], by their names in the linear whose weight [out, in] they adapt.
FACTORS = ("lora_a", "lora_b")


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adaptation (Hu et al. 2022): weights stay as they were, and products of two thin matrices are learned.

    A target's weight W [out, in] acts as W + alpha / rank * B A, with A [rank, in] and B [out, rank].
    """

    rank: int = 0
    """Rows of A and columns of B; 0: off, all weights are trained."""
    alpha: float = 16.0
    """The product B A is multiplied by alpha / rank."""
    targets: tuple[Literal["qkv", "attention_output", "up", "down"], ...] = ("qkv", "attention_output", "up", "down")
    """The linear layers of each block that are adapted."""

    def __post_init__(self) -> None:
        check_at_least(0, "lora.", self, "rank")
        require(self.alpha > 0, f"lora.alpha is {self.alpha}; expected above 0")
        require(
            0 < len(set(self.targets)) == len(self.targets),
            f"lora.targets is [{', '.join(self.targets)}]; expected one or more layers, each once",
        )

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank


NO_LORA = LoRAConfig()


def is_factor(name: str) -> bool:
    """Whether a parameter of this name was added by LoRA."""
    return name.endswith(FACTORS)
