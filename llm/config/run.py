"""A run is one YAML file plus `--section.field=value` overrides, parsed once into these frozen dataclasses.

Nothing else configures a run: the DeepSpeed config is generated from it (llm/train/engines/deepspeed_config.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from llm.config.checks import check_engine, check_finite, check_phases, check_sequence_parallel, check_tensor_parallel
from llm.config.sections import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
)
from llm.errors import require


@dataclass(frozen=True)
class RunConfig:
    """One run, whole."""

    name: str = "run"
    """The run's folder is runs/<name>."""
    seed: int = 1234
    """Of initial weights, sample order and dropout."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The architecture."""
    data: DataConfig = field(default_factory=DataConfig)
    """The corpus."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """The layout over processes."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The training loop."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Reporting."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Further keys for the DeepSpeed config; those that Ingot owns are refused."""

    def __post_init__(self) -> None:
        require(
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name) is not None,
            f"name is {self.name!r}; expected letters, digits, '_', '.' and '-', not first '_', '.' or '-': it "
            "names the run's folder",
        )
        require(0 <= self.seed < 2**32, f"seed is {self.seed}; expected 0 to 2^32 - 1")
        check_finite(self)
        check_phases(self)
        check_engine(self)
        check_tensor_parallel(self)
        check_sequence_parallel(self)
