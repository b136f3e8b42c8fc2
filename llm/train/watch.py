"""Watches a run's numbers as it trains: bad steps, bits that flip, gradients that come out otherwise, unequal replicas.

What it finds is said, or ends the run on every rank with the last good checkpoint's name (docs/reliability.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from llm.checkpoint.writer import last_good
from llm.config.phases import consumed_samples
from llm.errors import CorruptError, ReplicaError
from llm.parallel.agreement import backend_device, exchange
from llm.train.engines.base import MicroBatch, Refuse
from llm.train.guard import compare_replicas, diverged, odd_ranks, replica_message
from llm.train.replay import replay
from llm.train.rollback import Setbacks, roll_back
from llm.train.source import Say
from llm.train.spikes import Spikes
from llm.train.start import Run
from llm.train.state_hashes import StateHashes


class Watch:
    """Of one run. Every method is collective."""

    def __init__(self, run: Run, say: Say, finish_save: Callable[[], None]) -> None:
        """finish_save: waits for the save under way, before a message names the last good checkpoint."""
        self.run, self.say, self.finish_save, self.config = run, say, finish_save, run.config.train
        self.setbacks = Setbacks.of(run.resumed)
        streak = self.setbacks.in_a_row, self.setbacks.patience
        self.spikes = Spikes(self.config, run.device, self.setbacks.recent, *streak)
        self.hashes = StateHashes(run.engine)

    @property
    def returns(self) -> int:
        """How often the run went back."""
        return len(self.setbacks.passed_samples)

    def before_step(self, micro_batches: Sequence[MicroBatch], target_count: int | Tensor) -> None:
        """Before its passes. Raises CorruptError where gradients differ each time (replay)."""
        done, every = self.run.step, self.config.replay_interval
        if any(phase.first_step == done for phase in self.run.config.phases):
            self.spikes.forget()  # other data or batches have other losses and norms
        if every and (done + 1) % every == 0:
            warning = replay(self.run.engine, micro_batches, target_count)
            if warning is not None:
                self.say(f"warning: step {done + 1}: {warning}")

    def before_update(self, loss: Tensor) -> Refuse:
        """What decides, by the gradient's norm, whether the step with this loss is made."""
        self.hashes.compare()
        return partial(self.spikes.judge, loss)

    def after_step(self) -> None:
        """`run.step` counts it already."""
        every = self.config.state_check_interval
        self.hashes.after_step(due=every > 0 and (self.run.step + 1) % every == 0)

    def check_state(self) -> None:
        """Raise CorruptError, on every rank, if masters or moments have changed on any that no step has changed."""
        if self.config.state_check_interval == 0:
            return
        self.hashes.compare()
        found = self.hashes.found()
        vote = torch.tensor(len(found), device=backend_device())
        dist.all_reduce(vote, dist.ReduceOp.MAX)
        if not vote:
            return
        told = exchange("; ".join(found[:3]) or None)
        odd = [rank for rank, text in enumerate(told) if text is not None]
        self.finish_save()
        good = last_good(self.run.folder.checkpoints, self.run.step)
        what = f"step {self.run.step}: bits changed that no step has written, on rank {odd[0]}: {told[odd[0]]}"
        raise CorruptError(f"{what}; {good}: start again, and if it comes back without that host", odd)

    def good(self) -> None:
        """A step was made."""
        self.setbacks = self.setbacks._replace(in_a_row=0, patience=None)

    def bad(self, step: int, loss: float, norm: float, skipped_locally: int | None) -> bool:
        """`step` was left out; whether it was one too many, and the run went back to a checkpoint.

        Then it goes on behind that step's samples. Where it went back before and no step was good since, that would
        help no more: finite numbers are taken as they are. skipped_locally: of the feed, after the step. Raises
        FloatingPointError where there is no checkpoint, and when it went back too often.
        """
        self.setbacks = self.setbacks._replace(in_a_row=self.setbacks.in_a_row + 1)
        found = f"loss {loss:.4g}, gradient norm {norm:.4g}{self.spikes.usual()}"
        if self.setbacks.in_a_row < (self.setbacks.patience or self.config.spike_patience):
            self.say(f"warning: step {step} is left out: {found}")
            return False
        again, finite = self.setbacks.patience is not None, math.isfinite(loss) and math.isfinite(norm)
        self.finish_save()
        if not finite if again else self.returns >= self.config.rollbacks:
            self.end(found, step)
        self.run.heartbeat.enter("roll back")
        self.hashes.forget()
        back = roll_back(self.run, step, skipped_locally)
        if back is None:
            self.end(found, step)
        first, end = (consumed_samples(self.run.config.phases, each) for each in (back, step))
        patience = None if again else self.config.spike_window
        self.setbacks = Setbacks(0, patience, (*self.setbacks.passed_samples, (first, end)))
        self.spikes.resume(patience or self.config.spike_patience)
        if again:
            self.spikes.forget()
        told = (
            "such numbers are no spikes from here on" if again else f"return {self.returns} of {self.config.rollbacks}"
        )
        self.say(
            f"warning: step {step} is bad, as were those before: {found}; back to the weights of step {back}, and on "
            f"behind samples {first} to {end - 1} ({told})"
        )
        return True

    def end(self, found: str, step: int) -> NoReturn:
        """Raise FloatingPointError, on every rank, for numbers that the run cannot go on from."""
        self.finish_save()
        if self.config.precision == "fp16":
            found += " (in fp16 overflows at the smallest loss scale end a run: train.precision=bf16 has no such scale)"
        raise diverged(step, found, self.run.folder.checkpoints)

    def replicas(self) -> None:
        """Compare the replicas of each parameter; warn of those that differ, or raise ReplicaError on every rank."""
        self.run.heartbeat.enter("guard")
        findings = compare_replicas(self.run.engine, self.run.mesh)
        if findings and self.config.guard_action == "stop":
            self.finish_save()
            message = replica_message(self.run.step, findings, self.run.folder.checkpoints)
            raise ReplicaError(message, odd_ranks(findings))
        for finding in findings:
            self.say(f"warning: step {self.run.step}: {finding}")

    def state(self) -> Setbacks:
        """What a checkpoint keeps."""
        return self.setbacks._replace(recent=self.spikes.state())
