"""Finds bits of masters and moments that flip between two steps: what one has written, the next one must find.

Under ZeRO and FSDP these have no replica to be compared with (llm/train/guard.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm.train.engines.base import Engine
from llm.train.guard import checksum


class StateHashes:
    """Checksums of what this rank's optimizer updates. Nothing here waits for a GPU but `found`."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.tensors = engine, dict[str, Tensor]()
        self.written: Tensor | None = None
        self.changed: Tensor | None = None
        """Of which tensors, bool, so far."""

    def after_step(self, *, due: bool) -> None:
        """The state was written: remember what it is, if the next comparison is due."""
        self.written = None
        if due:
            self.tensors = self.engine.optimizer_tensors()
            self.written = self._sums()
            if self.changed is None or len(self.changed) != len(self.written):  # the first step adds moments
                self.changed = torch.zeros_like(self.written, dtype=torch.bool)

    def compare(self) -> None:
        """With what was remembered."""
        if self.written is not None and self.changed is not None:
            self.changed |= self._sums() != self.written

    def forget(self) -> None:
        """The state is about to be read from a checkpoint."""
        self.written = self.changed = None

    def found(self) -> list[str]:
        """The tensors that had changed in a comparison."""
        marks = [False] * len(self.tensors) if self.changed is None else self.changed.tolist()
        return [name for name, changed in zip(self.tensors, marks, strict=True) if changed]

    def _sums(self) -> Tensor:
        return torch.stack([checksum(tensor).to(self.engine.device) for tensor in self.tensors.values()])
