"""One YAML file and `--section.field=value` overrides, parsed into frozen sections."""

from llm.config.run import RunConfig
from llm.config.sections import DataConfig, ModelConfig, OptimConfig, ParallelConfig, PhaseChange, TrainConfig

__all__ = ["DataConfig", "ModelConfig", "OptimConfig", "ParallelConfig", "PhaseChange", "RunConfig", "TrainConfig"]
