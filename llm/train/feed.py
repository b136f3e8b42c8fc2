"""The micro-batches of each step, ready for the engine; on a GPU they are copied there one step ahead.

A loader may write over a step's buffers once it is asked for the next one. So it is asked only when the copy of the
last step has ended. Copies run on a stream of their own beside the computation, in the width of the token files; tokens
are widened where they are used.
"""

from __future__ import annotations

import dataclasses
import time
from typing import NamedTuple

import torch
from torch import Tensor

from llm.data.batch import Batch, Step
from llm.data.loader import Loader
from llm.data.tokens.hashes import HashCheck
from llm.train.engines.base import MicroBatch, micro_batch


class Taken(NamedTuple):
    """A step that the loader has given, and what the loader says of itself after it."""

    step: Step
    epochs: dict[str, float]
    copied: torch.cuda.Event | None
    """Passed once the step is on the GPU."""


class Feed:
    """Hands out `steps` steps of a loader, and asks it for no more."""

    def __init__(self, loader: Loader, device: torch.device, steps: int, hash_check: HashCheck | None = None) -> None:
        self.loader, self.device, self.hash_check = loader, device, hash_check
        self.left = steps
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.ahead: Taken | None = None
        self.wait_seconds = 0.0
        """Time that the trainer has waited here, for the loader and for copies."""
        self.skipped: int | None = None
        """Samples of this rank that were replaced, up to the last step handed out; None as in Step."""
        self.replaced_targets: int | None = None
        """Of the last step handed out."""
        self.epochs: dict[str, float] = {}
        """How often each corpus has been seen by then."""

    def next_step(self) -> tuple[list[MicroBatch], int]:
        """This rank's micro-batches of the next step on the device, and its count of targets over all ranks.

        Those of a CPU lie in the loader's buffers: they are valid until the next call. Raises InputError where the
        loader does, and where a file is not as its manifest says.
        """
        began = time.perf_counter()
        taken = self.ahead or self._take()
        self.ahead = None
        if taken.copied is not None:
            taken.copied.synchronize()
            # The copies belong to the other stream: their memory must not go back to it before this one has used them.
            for batch in taken.step.batches:
                for tensor in tensors(batch).values():
                    tensor.record_stream(torch.cuda.current_stream(self.device))
            if self.left:
                self.ahead = self._take()
        if taken.step.skipped_samples is not None:
            self.skipped = (self.skipped or 0) + taken.step.skipped_samples
        self.epochs, self.replaced_targets = taken.epochs, taken.step.replaced_targets
        self.wait_seconds += time.perf_counter() - began
        return [micro_batch(batch, self.device) for batch in taken.step.batches], taken.step.target_count

    def _take(self) -> Taken:
        """Ask the loader for a step and start its copy, if there is one to make."""
        if self.hash_check is not None:
            self.hash_check.check()
        step = self.loader.next_step()
        self.left -= 1
        copied = None
        if self.stream is not None:
            with torch.cuda.stream(self.stream):
                batches = [on_device(batch, self.device) for batch in step.batches]
                step = dataclasses.replace(step, batches=batches)
                copied = torch.cuda.Event()
                copied.record()
        return Taken(step, self.loader.epochs(), copied)

    def close(self) -> None:
        """End the loader, once nothing is copied from its buffers any more."""
        if self.ahead is not None and self.ahead.copied is not None:
            self.ahead.copied.synchronize()
        if self.hash_check is not None:
            self.hash_check.close()
        self.loader.close()


def on_device(batch: Batch, device: torch.device) -> Batch:
    """A copy of a batch, its tensors as they are; it may be under way still."""
    return Batch(**{name: x.to(device, non_blocking=True, copy=True) for name, x in tensors(batch).items()})


def tensors(batch: Batch) -> dict[str, Tensor]:
    """Those that a batch has, by the names of its fields."""
    return {name: tensor for name, tensor in vars(batch).items() if tensor is not None}
