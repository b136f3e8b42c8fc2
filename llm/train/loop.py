"""The training loop: batches in, steps, validation, metrics, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from llm.checkpoint.background import Saver
from llm.checkpoint.remote import Mirror, Remote
from llm.checkpoint.writer import last_good
from llm.config.phases import consumed_samples
from llm.errors import CorruptError, ReplicaError
from llm.parallel.agreement import backend_device, exchange, lead_first
from llm.train.best import Best
from llm.train.engines.base import StepResult
from llm.train.guard import compare_replicas, diverged, odd_ranks, replica_message
from llm.train.optim import learning_rate
from llm.train.profiling import Profiler
from llm.train.replay import replay
from llm.train.reporter import Reporter
from llm.train.resume import checkpoint_state
from llm.train.rollback import Setbacks, roll_back
from llm.train.spikes import Spikes
from llm.train.start import Run
from llm.train.state_hashes import StateHashes
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
        while not run.over and not ballot.agreed:
            trainer.profiler.step(trainer.step)
            logging, validating = due(config.logging.interval), due(config.train.eval_interval)
            saving = due(config.checkpoint.interval) or ballot.agreed > 0
            # What is saved was compared: else a checkpoint could keep what a failing rank wrote.
            watched = config.train.guard_interval > 0
            guarding = watched and (saving or due(config.train.guard_interval))
            if logging or validating or saving or guarding:
                passed = trainer.setbacks.passed_samples
                loss, grad_norm = trainer.read()  # else the device has steps to do while the host prepares the next
                if trainer.setbacks.passed_samples != passed:  # the run went back: what it has now is saved
                    logging, validating, saving, guarding = True, run.over, True, watched
                if run.step == config.train.max_steps:
                    ballot.close()
                run.heartbeat.enter("report")
                if logging:
                    reporter.step(loss, trainer.lr, grad_norm, trainer.skipped_steps)
                    trainer.profiler.read_request()
            left_out = validating and (ballot.agreed > 0 or not trainer.validate())
            saving = saving or run.over or (run.best is not None and run.best.step == run.step)
            guarding = guarding or (watched and saving)
            if guarding:
                trainer.guard()
            if saving:
                trainer.save(validation_due=left_out)
                ballot.vote()
            if guarding or validating or saving:
                reporter.restart_clock()
        trainer.profiler.close()
        trainer.finish_saving()
    ballot.leave_if_asked(run.folder, run.step or None, trainer.finish_copying)
    trainer.finish_copying()
    trainer.feed.close()


class Unread(NamedTuple):
    """A step that is queued: what it gives, and how long its parts take on this rank."""

    loss: Tensor
    result: StepResult
    waited: float
    skipped_locally: int | None
    """Of the feed, after this step."""
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
        self.hashes, self.unread = StateHashes(run.engine), list[Unread]()
        self.setbacks = Setbacks.of(run.resumed)
        streak = self.setbacks.in_a_row, self.setbacks.patience
        self.spikes = Spikes(run.config.train, run.device, self.setbacks.recent, *streak)
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
        if any(phase.first_step == run.step for phase in config.phases):
            self.spikes.forget()  # other data or batches have other losses and norms
        self.lr = learning_rate(config.optim, run.step, config.train.max_steps)
        self.engine.set_lr(self.lr)
        micro_batches, target_count = self.feed.next_step()
        heartbeat.enter("forward_backward")
        for watch in self.engine.waits.values():
            watch.running = True
        number, every = run.step + 1, config.train.state_check_interval
        if config.train.replay_interval and number % config.train.replay_interval == 0:
            warning = replay(self.engine, micro_batches, target_count)
            if warning is not None:
                self.reporter.say(f"warning: step {number}: {warning}")
        loss = self.engine.forward_backward(micro_batches, target_count)
        heartbeat.enter("update")
        self.hashes.compare()
        run.ballot.begin()
        with self.update_time:
            result = self.engine.step(partial(self.spikes.judge, loss))
        run.ballot.end()
        self.hashes.after_step(due=every > 0 and (number + 1) % every == 0)
        run.step = number
        times = self.engine.forward_time.take(), self.update_time.take()
        exposed = {group: watch.take() for group, watch in self.engine.waits.items()}
        waited, skipped = self.feed.wait_seconds - waited, self.feed.skipped_locally
        self.unread.append(Unread(loss, result, waited, skipped, *times, exposed))
        for watch in self.engine.waits.values():  # validations are no steps
            watch.running = False
        heartbeat.watch()

    def read(self) -> tuple[float, float]:
        """The loss and the gradient norm of the last step. Reads all steps since the last reading, in one transfer.

        This alone waits for the device. Says which steps were left out. When train.spike_patience of them follow one
        another, the run goes back (`_go_back`), and the last of them is the last step.

        Raises, on every rank, CorruptError if masters or moments have changed between two steps, and FloatingPointError
        where the run cannot go back: no checkpoint is there, or it has gone back train.rollbacks times.
        """
        self.run.heartbeat.enter("read")
        self._check_state()
        unread, self.unread = self.unread, []
        results = [x.to(step.loss) for step in unread for x in (step.loss, *step.result)]
        values = torch.stack(results).view(-1, 4).tolist()
        for step, (loss, grad_norm, skipped, left_out) in enumerate(values, self.run.step - len(values) + 1):
            self.skipped_steps += int(skipped or left_out)
            if left_out:
                self.setbacks = self.setbacks._replace(in_a_row=self.setbacks.in_a_row + 1)
                found = f"loss {loss:.4g}, gradient norm {grad_norm:.4g}{self.spikes.usual()}"
                if self.setbacks.in_a_row == (self.setbacks.patience or self.run.config.train.spike_patience):
                    finite = math.isfinite(loss) and math.isfinite(grad_norm)
                    self._go_back(step, found, finite, unread[step - self.run.step - 1].skipped_locally)
                    return loss, grad_norm
                self.reporter.say(f"warning: step {step} is left out: {found}")
            elif not skipped:
                self.setbacks = self.setbacks._replace(in_a_row=0, patience=None)
        for step in unread:
            self.reporter.stragglers.step(step.waited, step.forward(), step.update())
            self.reporter.exposed.update({group: seconds() for group, seconds in step.exposed.items()})
        return values[-1][0], values[-1][1]

    def _check_state(self) -> None:
        """Raise CorruptError, on every rank, if state has changed on any that no step has changed."""
        if self.run.config.train.state_check_interval == 0:
            return
        self.hashes.compare()
        found = self.hashes.found()
        vote = torch.tensor(len(found), device=backend_device())
        dist.all_reduce(vote, dist.ReduceOp.MAX)
        if not vote:
            return
        told = exchange("; ".join(found[:3]) or None)
        odd = [rank for rank, text in enumerate(told) if text is not None]
        self._wait_for_the_save()
        good = last_good(self.run.folder.checkpoints, self.run.step)
        what = f"step {self.run.step}: bits changed that no step has written, on rank {odd[0]}: {told[odd[0]]}"
        raise CorruptError(f"{what}; {good}: start again, and if it comes back without that host", odd)

    def _go_back(self, step: int, found: str, finite: bool, skipped_locally: int | None) -> None:
        """`step` is the last of too many bad ones: go on from the last checkpoint's weights, behind its samples.

        Where that was done and no step was good since, it would help no more: finite numbers are taken as they are.
        """
        run, most, again = self.run, self.run.config.train.rollbacks, self.setbacks.patience is not None
        self._wait_for_the_save()
        if not finite if again else len(self.setbacks.passed_samples) >= most:
            raise self._diverged(found, step)
        run.heartbeat.enter("roll back")
        self.hashes.forget()
        back = roll_back(run, step, skipped_locally)
        if back is None:
            raise self._diverged(found, step)
        first, end = (consumed_samples(run.config.phases, each) for each in (back, step))
        patience = None if again else run.config.train.spike_window
        self.setbacks = Setbacks(0, patience, (*self.setbacks.passed_samples, (first, end)))
        self.spikes.resume(patience or run.config.train.spike_patience)
        if again:
            self.spikes.forget()
        self.skipped_steps = step - self.engine.updates
        count = len(self.setbacks.passed_samples)
        told = "such numbers are no spikes from here on" if again else f"return {count} of {most}"
        self.reporter.say(
            f"warning: step {step} is bad, as were those before: {found}; back to the weights of step {back}, and on "
            f"behind samples {first} to {end - 1} ({told})"
        )

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
        measures = run.source.evaluate(self.engine, run.ballot.until_stopped(batches))
        if run.ballot.agreed:
            return False
        self.reporter.validation(measures)
        loss = measures["val_loss"]
        if not math.isfinite(loss):
            raise self._diverged(f"validation loss {loss}", run.step)
        if run.config.finetune.task != "none" and run.step > 0:
            run.best = run.best.after(run.step, loss) if run.best is not None else Best(run.step, loss)
            if run.best.since == run.config.finetune.patience:
                seen = f"none lower than {run.best.loss:.4f} (step {run.best.step}) in {run.best.since} validations"
                self.reporter.say(f"step {run.step}: {seen}; the run ends by finetune.patience")
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
        setbacks = self.setbacks._replace(recent=self.spikes.state())._asdict()
        state = checkpoint_state(run.config, run.source.identity(), run.step, skipped_samples, scalars, setbacks)
        state |= {"validation_due": True} if validation_due else {}
        state |= {"best": run.best._asdict()} if run.best is not None else {}
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
