"""The training loop: batches in, steps, validation, metrics, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from llm.checkpoint.background import Saver
from llm.checkpoint.remote import Mirror, Remote
from llm.errors import ReplicaError
from llm.parallel.agreement import lead_first
from llm.train.engines.base import StepResult
from llm.train.guard import compare_replicas, diverged, odd_ranks, replica_message
from llm.train.optim import learning_rate
from llm.train.profiling import Profiler
from llm.train.reporter import Reporter
from llm.train.resume import checkpoint_state
from llm.train.start import Run
from llm.train.stragglers import Stopwatch


def train(run: Run) -> None:
    """Train from `run.step` to the last step: report, validate, guard and save as the config says. Collective.

    Raises Stopped when a stop was asked for and agreed on before the last step, all that was done being saved.
    Raises FloatingPointError (see Trainer.step), ReplicaError (see Trainer.guard), and CheckpointError when a
    checkpoint cannot be written.
    """
    trainer, config, ballot = Trainer(run), run.config, run.ballot
    reporter = trainer.reporter

    def due(interval: int) -> bool:
        return run.step % interval == 0 or run.step == config.train.max_steps

    with reporter.console, reporter.metrics:
        if run.validation_due:
            trainer.validate()
            reporter.restart_clock()
        while run.step < config.train.max_steps and not ballot.agreed:
            trainer.profiler.step(trainer.step)
            if run.step == config.train.max_steps:
                ballot.close()
            logging, validating = due(config.logging.interval), due(config.train.eval_interval)
            saving = due(config.checkpoint.interval) or ballot.agreed > 0
            # What is saved was compared: else a checkpoint could keep what a failing rank wrote.
            guarding = config.train.guard_interval > 0 and (saving or due(config.train.guard_interval))
            if logging or validating or saving or guarding:
                loss, grad_norm = trainer.read()  # else the device has steps to do while the host prepares the next
                run.heartbeat.enter("report")
                if logging:
                    reporter.step(loss, trainer.lr, grad_norm, trainer.skipped_steps)
                    trainer.profiler.read_request()
            left_out = validating and (ballot.agreed > 0 or not trainer.validate())
            if guarding:
                trainer.guard()
            if saving:
                trainer.save(validation_due=left_out)
                ballot.vote()
            if guarding or validating or saving:
                reporter.restart_clock()
        trainer.profiler.close()
        trainer.finish_saving()
    ballot.leave_if_asked(run.folder, run.step, trainer.finish_copying)
    trainer.finish_copying()
    trainer.feed.close()


class Unread(NamedTuple):
    """A step that is queued: what it gives, and how long its parts take on this rank."""

    loss: Tensor
    result: StepResult
    waited: float
    forward: Callable[[], float]
    update: Callable[[], float]
    exposed: dict[str, Callable[[], float]]
    """Waits in collectives, by group (Engine.waits)."""


class Trainer:
    """A run under way: what its steps share. Every method is collective."""

    lr = 0.0
    """Of the last step."""

    def __init__(self, run: Run) -> None:
        self.run, self.feed, self.engine = run, run.feed, run.engine
        self.reporter, self.update_time = Reporter(run), Stopwatch(run.device)
        self.profiler = Profiler(run, self.reporter.say)
        self.skipped_steps = run.step - run.engine.scalar_state()["optimizer_step"]
        """Up to the last reading."""
        self.unread: list[Unread] = []
        say, kept = self.reporter.say, run.config.checkpoint
        keep = {"keep_last": kept.keep_last, "keep_every": kept.keep_every, "say": say}
        options = {"each": partial(run.heartbeat.each, "save"), "failed": run.ballot.save_failed}
        self.mirror = None
        if kept.copy_to is not None and run.lead:
            remote, patience = Remote(kept.copy_to, run.config.name), run.config.train.stall_seconds
            self.mirror = mirror = Mirror(remote, patience=patience, **keep)
            options |= {"saved": mirror.begin, "copying": lambda: mirror.copying}
        self.saver = Saver(run.folder.checkpoints, asynchronous=kept.asynchronous, **options, **keep)
        run.heartbeat.groups.append(self.saver.group)

    def step(self) -> None:
        """One optimizer step, of which `read` gives the results. On a GPU it may still be under way."""
        run, config, heartbeat = self.run, self.run.config, self.run.heartbeat
        heartbeat.enter("load", run.step + 1)
        waited = self.feed.wait_seconds
        self.lr = learning_rate(config.optim, run.step, config.train.max_steps)
        self.engine.set_lr(self.lr)
        micro_batches, target_count = self.feed.next_step()
        heartbeat.enter("forward_backward")
        for watch in self.engine.waits.values():
            watch.running = True
        loss = self.engine.forward_backward(micro_batches, target_count)
        heartbeat.enter("update")
        run.ballot.begin()
        with self.update_time:
            result = self.engine.step()
        run.ballot.end()
        run.step += 1
        times = self.engine.forward_time.take(), self.update_time.take()
        exposed = {group: watch.take() for group, watch in self.engine.waits.items()}
        self.unread.append(Unread(loss, result, self.feed.wait_seconds - waited, *times, exposed))
        for watch in self.engine.waits.values():  # validations are no steps
            watch.running = False
        heartbeat.watch()

    def read(self) -> tuple[float, float]:
        """The loss and the gradient norm of the last step. Reads all steps since the last reading, in one transfer.

        This alone waits for the device. Raises FloatingPointError, on every rank, of the first step whose loss or norm
        is not finite and which was not skipped. No weight has such a gradient in it: the engine left out the update.
        """
        self.run.heartbeat.enter("read")
        unread, self.unread = self.unread, []
        results = [x.to(step.loss) for step in unread for x in (step.loss, *step.result)]
        values = torch.stack(results).view(-1, 3).tolist()
        for step, (loss, grad_norm, skipped) in enumerate(values, self.run.step - len(values) + 1):
            self.skipped_steps += int(skipped)
            if not skipped and not (math.isfinite(loss) and math.isfinite(grad_norm)):
                raise self._diverged(f"loss {loss}, gradient norm {grad_norm}", step)
        for step in unread:
            self.reporter.stragglers.step(step.waited, step.forward(), step.update())
            self.reporter.exposed.update({group: seconds() for group, seconds in step.exposed.items()})
        return values[-1][0], values[-1][1]

    def guard(self) -> None:
        """Compare the replicas of each parameter; warn of those that differ, or raise ReplicaError on every rank."""
        self.run.heartbeat.enter("guard")
        findings = compare_replicas(self.engine, self.run.mesh)
        if findings and self.run.config.train.guard_action == "stop":
            self._wait_for_the_save()
            message = replica_message(self.run.step, findings, self.run.folder.checkpoints)
            raise ReplicaError(message, odd_ranks(findings))
        for finding in findings:
            self.reporter.say(f"warning: step {self.run.step}: {finding}")

    def validate(self) -> bool:
        """Whether it was not left for a stop, which is asked for after each batch.

        Raises FloatingPointError, on every rank, when the loss is not finite: so nothing is saved.
        """
        run = self.run
        run.heartbeat.enter("validation")
        batches = run.heartbeat.each("validation", run.validation_batches())
        total, count = self.engine.evaluate(run.ballot.until_stopped(batches))
        if run.ballot.agreed:
            return False
        loss = total / count
        self.reporter.validation(loss)
        if not math.isfinite(loss):
            raise self._diverged(f"validation loss {loss}", run.step)
        return True

    def _diverged(self, found: str, step: int) -> FloatingPointError:
        self._wait_for_the_save()
        if self.run.config.train.precision == "fp16":
            found += " (in fp16 overflows at the smallest loss scale end a run: train.precision=bf16 has no such scale)"
        return diverged(step, found, self.run.folder.checkpoints)

    def _wait_for_the_save(self) -> None:
        """That is under way, before a message names the last good checkpoint. Raises CheckpointError if it fails."""
        self.run.heartbeat.enter("save")
        self.saver.wait()

    def save(self, *, validation_due: bool = False) -> None:
        """validation_due: that of this step was left for a stop, so the next start begins with it."""
        self.run.heartbeat.enter("save")
        run, skipped_samples, scalars = self.run, self.feed.skipped_samples(), self.engine.scalar_state()
        state = checkpoint_state(run.config, run.corpora, run.step, skipped_samples, scalars)
        state |= {"validation_due": True} if validation_due else {}
        self.saver.save(run.step, self.engine.state_pieces(), state)

    def finish_saving(self) -> None:
        """Return when all is saved. Raises CheckpointError where a save has failed."""
        self.run.heartbeat.enter("save")
        self.saver.close()
        self.run.heartbeat.close()  # a copy takes as long as its store does, and watches itself

    def finish_copying(self) -> None:
        """Return when the copy under way is made, or has failed."""
        if self.run.config.checkpoint.copy_to is not None:
            lead_first(lambda: self.mirror.close() if self.mirror is not None else None)
