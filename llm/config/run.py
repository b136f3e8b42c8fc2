"""A run is one YAML file plus `--section.field=value` overrides, parsed once into these frozen dataclasses.

Nothing else configures a run: the DeepSpeed config is generated from it (llm/train/engines/deepspeed_config.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from llm.config import checks, reports, sections
from llm.config.finetune import FinetuneConfig
from llm.config.lora import LoRAConfig
from llm.config.phases import Phase, phases_of
from llm.errors import require
from llm.typed import shown


@dataclass(frozen=True)
class RunConfig:
    """One run, whole."""

    name: str = "run"
    """The run's folder is runs/<name>."""
    seed: int = 1234
    """Of initial weights, sample order and dropout."""
    model: sections.ModelConfig = field(default_factory=sections.ModelConfig)
    data: sections.DataConfig = field(default_factory=sections.DataConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    optim: sections.OptimConfig = field(default_factory=sections.OptimConfig)
    parallel: sections.ParallelConfig = field(default_factory=sections.ParallelConfig)
    train: sections.TrainConfig = field(default_factory=sections.TrainConfig)
    checkpoint: sections.CheckpointConfig = field(default_factory=sections.CheckpointConfig)
    logging: reports.LoggingConfig = field(default_factory=reports.LoggingConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    profile: reports.ProfileConfig = field(default_factory=reports.ProfileConfig)
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Further keys for the DeepSpeed config; those that Ingot owns are refused."""

    def __post_init__(self) -> None:
        require(
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name) is not None,
            f"name is {shown(self.name)}; expected letters, digits, '_', '.' and '-', not first '_', '.' or '-': it "
            "names the run's folder",
        )
        require(0 <= self.seed < 2**32, f"seed is {self.seed}; expected 0 to 2^32 - 1")
        longest, positions = max(phase.seq_len for phase in self.phases), self.model.max_seq_len
        require(longest <= positions, f"data.seq_len {longest} is above model.max_seq_len {positions}")
        last = (self.profile.steps or (0, 0))[1]
        found = f"profile.steps ends with {last}, the run with train.max_steps {self.train.max_steps}"
        require(last < self.train.max_steps, f"{found}; expected less: the step after a profile measures memory")
        checks.check_lora(self.lora, self.model, self.train)
        checks.check_muon(self.optim, self.parallel, self.lora)
        checks.check_engine(self.train, self.parallel, self.deepspeed)
        checks.check_compile(self.train, self.parallel, self.model, self.profile)
        checks.check_finetune(self.finetune, self.data)
        checks.check_lstm(self.model, self.data, self.parallel, self.train)
        checks.check_tensor_parallel(self.model, self.parallel, self.phases)
        checks.check_fp8(self.model, self.lora, self.parallel, self.train, self.phases)

    @cached_property
    def phases(self) -> tuple[Phase, ...]:
        """The parts of the run in which sequence length, batch size and blend stay as they are."""
        return phases_of(self.data, self.train.global_batch_size)

    def check_world(self, world_size: int) -> None:
        """Check that `world_size` ranks can share this run's layers and batch (llm/config/checks.py)."""
        checks.check_world(self.parallel, self.train.micro_batch_size, self.phases, world_size)
