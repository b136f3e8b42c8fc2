"""The micro-batches of a step, as the loader passes them to training."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from numpy.typing import NDArray
from torch import Tensor

from llm.data.samples.schedule import Curriculum


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the CPU (pinned when there is a GPU): B samples of T tokens and the one after."""

    tokens: Tensor
    """[B, T + 1] as in the file (uint8, uint16, int32) or int64. Inputs are [:, :-1], targets [:, 1:]."""
    sample_ids: Tensor
    """[B] int64, the global numbers of the samples."""
    position_ids: Tensor | None = None
    """[B, T] int32, counted from 0 in every document; None unless data.document_masks."""
    cu_seqlens: Tensor | None = None
    """[documents + 1] int32, where the documents begin in the B * T inputs, from 0 to B * T; None likewise."""
    counted: Tensor | None = None
    """[B, T] uint8, 0 where a target is not to be learnt (padding, the token after a packed piece); None: all are."""


@dataclass(frozen=True)
class Step:
    """What one data-parallel rank computes in one optimizer step. Valid until the next one is asked for."""

    batches: list[Batch]
    target_count: int
    """Targets that count, over all ranks, as planned: before any sample is replaced."""
    skipped_samples: int | None = None
    """Samples of this rank that could not be read and were replaced; None: data.damaged is stop."""
    replaced_targets: int | None = None
    """By how much that changed this rank's targets: the sum over the data-parallel ranks belongs to target_count.
    None where it cannot: data.damaged is stop, or samples are chunks."""


class Loader(ABC):
    """Training batches of one data-parallel rank."""

    def __init__(self, curriculum: Curriculum, consumed: int) -> None:
        self._curriculum = curriculum
        self.consumed = consumed
        """Samples of the global order that all ranks together have taken: the loader's state."""
        self.wait_seconds = 0.0
        """Time spent inside next_step() so far."""

    def next_step(self) -> Step:
        """The next step on this rank; the one before it must not be used any more.

        Raises InputError (a subclass of it: DamagedFile) when a file is damaged and data.damaged is stop.
        """
        start = time.perf_counter()
        step, samples = self._assemble()
        self.consumed += samples
        self.wait_seconds += time.perf_counter() - start
        return step

    @abstractmethod
    def _assemble(self) -> tuple[Step, int]:
        """The next step on this rank, and the samples of all ranks in it."""

    def epochs(self) -> dict[str, float]:
        """How often the consumed samples have gone through each corpus."""
        return self._curriculum.epochs(self.consumed)

    def close(self) -> None:  # noqa: B027
        """End the threads, if any; next_step() must not be called afterwards."""


def batch_of(*arrays: NDArray) -> Batch:
    """The fields of a Batch, in order, as tensors over the same memory; pinned, by a copy, when there is a GPU."""
    tensors = [torch.from_numpy(array) for array in arrays]
    return Batch(*(tensor.pin_memory() for tensor in tensors) if torch.cuda.is_available() else tensors)
