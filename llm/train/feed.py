"""Feeds the engine the micro-batches of each step. On a GPU they are copied there one step ahead.

A loader may overwrite a step's buffers once it is asked for the next one, so it is asked only when the copy of the last
step has ended. Copies run on a stream of their own beside the computation. They keep the width of the token files;
tokens are widened on the GPU.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from llm.data.batch import Batch, Step
from llm.data.loader import Loader
from llm.data.tokens.hashes import HashCheck
from llm.train.engines.base import MicroBatch, micro_batch, sum_over


class Fetched(NamedTuple):
    """A step of the loader, and how often each corpus has been seen after it."""

    step: Step
    epochs: dict[str, float]
    copied: torch.cuda.Event | None
    """Passed once the step is on the GPU."""


class Feed:
    """Hands out `steps` steps of a loader, and asks it for no more."""

    def __init__(
        self,
        loader: Loader,
        device: torch.device,
        steps: int,
        group: dist.ProcessGroup | None = None,
        *,
        hash_check: HashCheck | None = None,
        skipped_samples: int = 0,
    ) -> None:
        """group: the data-parallel ranks, None if alone; skipped_samples: of all of them, before this process."""
        self.loader, self.device, self.steps, self.group = loader, device, steps, group
        self.hash_check = hash_check
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.ahead: Fetched | None = None
        self.wait_seconds = 0.0
        """Time that the trainer has waited here, for the loader and for copies."""
        self.epochs: dict[str, float] = {}
        """How often each corpus has been seen, up to the last step handed out."""
        self.skipped_before = skipped_samples
        self.skipped_locally: int | None = None
        """Samples of this rank that were replaced up to then; None where none may be."""

    def next_step(self) -> tuple[list[MicroBatch], int | Tensor]:
        """This rank's micro-batches of the next step on the device, and the count of targets over all ranks.

        That count is a tensor, int64 [] on the device, where ranks must tell one another what they replaced.
        Those of a CPU lie in the loader's buffers: they are valid until the next call. Raises InputError where the
        loader does, or where a token file was found damaged. Collective.
        """
        start = time.perf_counter()
        fetched = self.ahead or self._fetch()
        self.ahead = None
        if fetched.copied is not None:
            fetched.copied.synchronize()  # a copy that began a step ago; no computation is waited for
            # The copies belong to the other stream: their memory must not go back to it before this one has used them.
            for batch in fetched.step.batches:
                for tensor in tensors(batch).values():
                    tensor.record_stream(torch.cuda.current_stream(self.device))
            if self.steps:
                self.ahead = self._fetch()
        self.wait_seconds += time.perf_counter() - start
        step, self.epochs = fetched.step, fetched.epochs
        if step.skipped_samples is not None:
            self.skipped_locally = (self.skipped_locally or 0) + step.skipped_samples
        target_count: int | Tensor = step.target_count
        if step.replaced_targets is not None:  # which the other ranks cannot know
            target_count = target_count + self._over_ranks(step.replaced_targets)
        return [micro_batch(batch, self.device) for batch in step.batches], target_count

    def _fetch(self) -> Fetched:
        """Ask the loader for a step and start its copy, if there is one to make."""
        if self.hash_check is not None:
            self.hash_check.check()
        step = self.loader.next_step()
        self.steps -= 1
        copied = None
        if self.stream is not None:
            with torch.cuda.stream(self.stream):
                batches = [on_device(batch, self.device) for batch in step.batches]
                step = dataclasses.replace(step, batches=batches)
                copied = torch.cuda.Event()
                copied.record()
        return Fetched(step, self.loader.epochs(), copied)

    def restart(self, loader: Loader, steps: int, skipped_locally: int | None) -> None:
        """Hand out `steps` steps of another loader from here on; the last one is closed.

        skipped_locally: samples that were replaced before them.
        """
        if self.ahead is not None and self.ahead.copied is not None:
            self.ahead.copied.synchronize()
        self.loader.close()
        self.loader, self.steps, self.ahead, self.skipped_locally = loader, steps, None, skipped_locally

    def skipped_samples(self) -> int:
        """Samples that were replaced since the run began, over all ranks. Collective."""
        here = self.skipped_locally
        return self.skipped_before + (0 if here is None else int(self._over_ranks(here)))

    def record(self) -> dict[str, Any]:
        """What a metrics line says of the data. Collective."""
        record: dict[str, Any] = {"epochs": self.epochs} if self.epochs else {}
        return record if self.skipped_locally is None else record | {"skipped_samples": self.skipped_samples()}

    def _over_ranks(self, number: int) -> Tensor:
        return sum_over(torch.full((), number, device=self.device), self.group)

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
