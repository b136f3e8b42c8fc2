"""Reads a checkpoint of a run with LoRA as one of the model without it: W + alpha / rank * B A stands for W."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from llm.checkpoint.reader import CheckpointReader
from llm.config import RunConfig
from llm.config.lora import FACTORS, LoRAConfig, is_factor
from llm.errors import CheckpointError
from llm.slices import Slice


class MergedReader(CheckpointReader):
    """The weights alone: the moments are the factors', and there are no factors here."""

    def __init__(self, source: CheckpointReader, lora: LoRAConfig) -> None:
        kept = {key: entry for key, entry in source.manifest.tensors.items() if not is_factor(key[0])}
        super().__init__(source.folder, replace(source.manifest, tensors=kept), source.state)
        self.source, self.scale = source, lora.scale

    def read_slice(self, name: str, kind: str, part: Slice) -> Tensor:
        weight = super().read_slice(name, kind, part)
        owner = name.removesuffix(".weight")
        a, b = (f"{owner}.{factor}" for factor in FACTORS)
        if (a, "master") not in self.source.manifest.tensors:
            return weight
        update = self.scale * (self.source.read(b) @ self.source.read(a))
        if tuple(update.shape) != part.global_shape:
            shapes = f"{tuple(update.shape)} in {self.folder}, {name} is {part.global_shape}"
            raise CheckpointError(f"the product of {b} and {a} is {shapes}")
        return weight + part.take(update)

    def read_range(self, name: str, kind: str, part: Slice, start: int, length: int) -> Tensor:
        return self.read_slice(name, kind, part).flatten().narrow(0, start, length)


def without_lora(source: CheckpointReader, config: RunConfig) -> tuple[CheckpointReader, RunConfig]:
    """The checkpoint and its config as those of the model without LoRA; the same ones where it has none."""
    if config.lora.rank == 0:
        return source, config
    return MergedReader(source, config.lora), replace(config, lora=LoRAConfig())
