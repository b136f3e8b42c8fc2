"""Saves a run's checkpoints while it waits, or beside its steps, which then wait for a copy in memory alone."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm.checkpoint.manifest import Piece
from llm.checkpoint.writer import SHARD_BYTES, write_checkpoint
from llm.errors import CheckpointError
from llm.files import by_size
from llm.parallel.agreement import patient_group, together

NICENESS = 12  # of the thread that writes: where cores are few, a step goes first


class Saver:
    """Saves the checkpoints of one run, one after the other. Every method is collective.

    The ranks agree on a save in a group of their own, which waits as long as the slowest disk takes.
    """

    def __init__(
        self,
        root: Path,
        *,
        asynchronous: bool,
        say: Callable[[str], None],
        saved: Callable[[Path], None] = lambda path: None,
        failed: Callable[[], None] = lambda: None,
        **options: Any,
    ) -> None:
        """saved: called on every rank once a checkpoint is whole; failed: once a save has failed, by its thread.
        options: more of `write_checkpoint`.
        """
        self.root, self.asynchronous, self.say = root, asynchronous, say
        self.saved, self.failed, self.options = saved, failed, options
        self.buffers: list[Tensor] = []
        """Copies of the pieces, each of several: the memory is the same from save to save."""
        self.pending: Future[None] | None = None
        self.open = ExitStack()
        self.group = self.open.enter_context(patient_group())
        self.thread = ThreadPoolExecutor(1, "checkpoint", initializer=_yield_to_training)

    def save(self, step: int, pieces: Iterable[Piece], state: dict[str, Any]) -> None:
        """Save; asynchronous: begin to, when the save before is done, and return once training may change the pieces.

        Raises CheckpointError, on every rank, where this save fails, or the one before did beside the steps.
        """
        self.wait()
        if not self.asynchronous:
            self._write(step, list(pieces), state)
            return
        copies = together(lambda: self._copied(step, list(pieces)), self.group)
        self.pending = self.thread.submit(self._write, step, copies, copy.deepcopy(state))

    def wait(self) -> None:
        """Until the save that was begun is done. Raises its CheckpointError, on every rank."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """`wait`, and give back what is held. Only where no rank has failed."""
        self.wait()
        self.thread.shutdown()
        self.open.close()

    def _copied(self, step: int, pieces: list[Piece]) -> list[Piece]:
        """The pieces as they are now, in `buffers`. Raises CheckpointError."""
        assert {piece.data.dtype for piece in pieces} <= {torch.float32}  # a copy would convert others
        shards = list(by_size(pieces, lambda piece: piece.data.nbytes, SHARD_BYTES))
        sizes = [sum(len(piece.data) for piece in shard) for shard in shards]
        pinned = any(piece.data.is_cuda for piece in pieces)
        if sizes != [len(buffer) for buffer in self.buffers]:
            self.buffers.clear()  # before others are taken
            # Several, for the allocator of pinned memory rounds each up to a power of two.
            try:
                self.buffers += [torch.empty(size, pin_memory=pinned) for size in sizes]
            except RuntimeError as error:
                what = f"step {step} cannot be copied: {4 * sum(sizes)} bytes of the host's memory are needed"
                raise CheckpointError(f"{what} ({error!r}); use checkpoint.asynchronous=false") from error
        copies = []
        for buffer, shard in zip(self.buffers, shards, strict=True):
            for piece, part in zip(shard, buffer.split([len(piece.data) for piece in shard]), strict=True):
                part.copy_(piece.data, non_blocking=True)
                copies.append(replace(piece, data=part))
        if pinned:
            torch.cuda.current_stream().synchronize()
        return copies

    def _write(self, step: int, pieces: list[Piece], state: dict[str, Any]) -> None:
        size = sum(piece.data.nbytes for piece in pieces)
        try:
            path = write_checkpoint(
                self.root, step, pieces, state, **self.options, size=size, say=self.say, group=self.group
            )
        except BaseException:
            self.failed()
            raise
        self.say(f"step {step}: saved {path}")
        self.saved(path)


def _yield_to_training() -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
