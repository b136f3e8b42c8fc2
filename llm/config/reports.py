"""The sections of a run's config that say what it reports."""

from __future__ import annotations

from dataclasses import dataclass

from llm.config.sections import check_at_least
from llm.errors import require


@dataclass(frozen=True)
class LoggingConfig:
    """What a run reports."""

    interval: int = 1
    """Steps between metric lines."""
    tensorboard: bool = True
    """Write TensorBoard events to runs/<name>/tensorboard."""
    wandb: bool = False
    """Send the same numbers to Weights & Biases (WANDB_PROJECT, WANDB_ENTITY); needs `pip install -e '.[wandb]'`."""
    peak_tflops: float | None = None
    """Peak of one device in train.precision, TFLOP/s, for MFU; null: that of a known GPU, and no MFU on others."""
    sample_prompt: str = "def "
    """Text that the finished model continues."""
    sample_tokens: int = 120
    """Tokens of that sample; 0 prints none."""

    def __post_init__(self) -> None:
        check_at_least(1, "logging.", self, "interval")
        check_at_least(0, "logging.", self, "sample_tokens")
        peak = self.peak_tflops
        require(peak is None or peak > 0, f"logging.peak_tflops is {peak}; expected above 0, or null")


@dataclass(frozen=True)
class ProfileConfig:
    """Which steps are profiled (docs/profiling.md)."""

    steps: tuple[int, int] | None = None
    """The first and the last step to profile, such as [20, 24]; null: none, until a file in the run's folder asks."""

    def __post_init__(self) -> None:
        first, last = self.steps or (2, 2)
        expected = "expected 2 <= first <= last, as the steps before the first are timed for comparison"
        require(2 <= first <= last, f"profile.steps is [{first}, {last}]; {expected}")
