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
from llm.parallel.agreement import lead_first
from llm.train.best import Best
from llm.train.engines.base import StepResult
from llm.train.optim import learning_rate
from llm.train.profiling import Profiler
from llm.train.reporter import Reporter
from llm.train.resume import checkpoint_state
from llm.train.start import Run
from llm.train.stragglers import Stopwatch
from llm.train.watch import Watch


def train(run: Run) -> None:
    """Train from `run.step` to the last step: report, validate, guard and save as the config says. Collective.

    Raises Stopped when a stop was asked for and agreed on before the last step, all that was done being saved.
    Raises what Watch raises, and CheckpointError when a checkpoint cannot be written.
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
                returns = trainer.watch.returns
                loss, grad_norm = trainer.read()  # else the device has steps to do while the host prepares the next
                if trainer.watch.returns > returns:  # the run went back: what it has now is saved
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
                trainer.watch.replicas()
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
        self.unread: list[Unread] = []
        self.watch = Watch(run, self.reporter.say, self._wait_for_the_save)
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
        self.watch.before_step(micro_batches, target_count)
        for wait in self.engine.waits.values():
            wait.running = True
        loss = self.engine.forward_backward(micro_batches, target_count)
        heartbeat.enter("update")
        refuse = self.watch.before_update(loss)
        run.ballot.begin()
        with self.update_time:
            result = self.engine.step(refuse)
        run.ballot.end()
        run.step += 1
        self.watch.after_step()
        times = self.engine.forward_time.take(), self.update_time.take()
        exposed = {group: wait.take() for group, wait in self.engine.waits.items()}
        waited, skipped = self.feed.wait_seconds - waited, self.feed.skipped_locally
        self.unread.append(Unread(loss, result, waited, skipped, *times, exposed))
        for wait in self.engine.waits.values():  # validations are no steps
            wait.running = False
        heartbeat.watch()

    def read(self) -> tuple[float, float]:
        """The loss and the gradient norm of the last step. Reads all steps since the last reading, in one transfer.

        This alone waits for the device. When too many steps were left out the run goes back to a checkpoint, and the
        last of them is the last step (Watch.bad). Raises, on every rank, what Watch raises.
        """
        self.run.heartbeat.enter("read")
        self.watch.check_state()
        unread, self.unread = self.unread, []
        results = [x.to(step.loss) for step in unread for x in (step.loss, *step.result)]
        values = torch.stack(results).view(-1, 4).tolist()
        for step, (loss, grad_norm, skipped, left_out) in enumerate(values, self.run.step - len(values) + 1):
            self.skipped_steps += int(skipped or left_out)
            if left_out and self.watch.bad(step, loss, grad_norm, unread[step - self.run.step - 1].skipped_locally):
                self.skipped_steps = step - self.engine.updates
                return loss, grad_norm
            if not (left_out or skipped):
                self.watch.good()
        for step in unread:
            self.reporter.stragglers.step(step.waited, step.forward(), step.update())
            self.reporter.exposed.update({group: seconds() for group, seconds in step.exposed.items()})
        return values[-1][0], values[-1][1]

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
            self.watch.end(f"validation loss {loss}", run.step)
        if run.config.finetune.task != "none" and run.step > 0:
            run.best = run.best.after(run.step, loss) if run.best is not None else Best(run.step, loss)
            if run.best.since == run.config.finetune.patience:
                seen = f"none lower than {run.best.loss:.4f} (step {run.best.step}) in {run.best.since} validations"
                self.reporter.say(f"step {run.step}: {seen}; the run ends by finetune.patience")
        return True

    def _wait_for_the_save(self) -> None:
        """That is under way, before a message names the last good checkpoint. Raises CheckpointError if it fails."""
        self.run.heartbeat.enter("save")
        self.saver.wait()

    def save(self, *, validation_due: bool = False) -> None:
        """validation_due: that of this step was left for a stop, so the next start begins with it."""
        self.run.heartbeat.enter("save")
        run, skipped_samples, scalars = self.run, self.feed.skipped_samples(), self.engine.scalar_state()
        about = run.config, run.source.identity(), run.step, skipped_samples, scalars
        state = checkpoint_state(*about, self.watch.state()._asdict())
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
