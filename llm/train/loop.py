"""The training loop: batches in, steps, validation, metrics, checkpoints."""

from __future__ import annotations

import math
import time

import torch

from llm.checkpoint.writer import write_checkpoint
from llm.errors import ReplicaError
from llm.train.console import Console
from llm.train.engines.base import micro_batch, sum_over
from llm.train.feed import Feed
from llm.train.guard import compare_replicas, replica_message
from llm.train.metrics import MetricsWriter, peak_memory, step_record, validation_record, workload
from llm.train.optim import learning_rate
from llm.train.start import Run, checkpoint_state


class Trainer:
    """A run under way: what its steps share."""

    def __init__(self, run: Run) -> None:
        assert run.engine is not None, "the run is complete"
        assert run.loader is not None
        config = run.config
        self.run, self.engine = run, run.engine
        self.feed = Feed(run.loader, run.device, config.train.max_steps - run.step, run.hash_check)
        self.work = workload(config, run.device, run.mesh.world_size)
        tensorboard = run.folder.tensorboard if config.logging.tensorboard else None
        self.metrics = MetricsWriter(run.folder.metrics, tensorboard, first_step=run.step, enabled=run.lead)
        self.console = Console(config.train.max_steps, run.step, enabled=run.lead)
        self.skipped_steps = run.step - self.engine.scalar_state()["optimizer_step"]
        self.skipped_before = run.skipped_samples

    def step(self) -> tuple[float, float, float]:
        """One optimizer step; returns its loss, learning rate and gradient norm.

        Raises FloatingPointError, on every rank, when the loss or the norm is not finite and nothing was skipped.
        """
        config, run = self.run.config, self.run
        lr = learning_rate(config.optim, run.step, config.train.max_steps)
        self.engine.set_lr(lr)
        batches, target_count = self.feed.next_step()
        if self.feed.replaced_targets is not None:  # the other ranks cannot know
            target_count += self.sum_over_data(self.feed.replaced_targets)
        loss = self.engine.forward_backward(batches, target_count)
        result = self.engine.step()
        run.step += 1
        self.skipped_steps += result.skipped
        if not result.skipped and not (math.isfinite(loss) and math.isfinite(result.grad_norm)):
            raise FloatingPointError(
                f"step {run.step}: loss {loss}, gradient norm {result.grad_norm}; the checkpoints from before are "
                "whole: lower optim.lr or optim.grad_clip, or look at the data, and start again"
            )
        return loss, lr, result.grad_norm

    def report(self, loss: float, lr: float, grad_norm: float, since: int, seconds: float, waited: float) -> None:
        """Write and show the metrics of a step; `since` to `waited` as in `step_record`. Collective."""
        record = step_record(
            self.work,
            step=self.run.step,
            since=since,
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            skipped_steps=self.skipped_steps,
            seconds=seconds,
            wait_seconds=waited,
            memory_bytes=peak_memory(self.run.device),
        )
        if self.feed.epochs:
            record["epochs"] = self.feed.epochs
        if self.feed.skipped is not None:
            self.count_skipped_samples(self.feed.skipped)
            record["skipped_samples"] = self.run.skipped_samples
        self.metrics.write(record)
        self.console.step(record)

    def count_skipped_samples(self, skipped: int) -> None:
        """Add up what the data-parallel ranks have skipped. Collective."""
        self.run.skipped_samples = self.skipped_before + self.sum_over_data(skipped)

    def sum_over_data(self, number: int) -> int:
        """The sum of the data-parallel ranks' numbers. Collective."""
        total = torch.tensor([number])
        sum_over(total, self.run.mesh.dp_group, self.run.device)
        return int(total)

    def guard(self) -> None:
        """Compare the replicas of each parameter; warn of those that differ, or raise ReplicaError on every rank."""
        findings = compare_replicas(self.engine, self.run.mesh)
        if findings and self.run.config.train.guard_action == "stop":
            raise ReplicaError(replica_message(self.run.step, findings))
        for finding in findings:
            self.console.say(f"warning: step {self.run.step}: {finding}")

    def validate(self) -> None:
        batches = (micro_batch(batch, self.run.device, rows) for batch, rows in self.run.validation_batches())
        total, count = self.engine.evaluate(batches)
        record = validation_record(self.run.step, total / count, self.run.corpora.manifest.bytes_per_token)
        self.metrics.write(record)
        bits = f", {record['val_bits_per_byte']:.4f} bits per byte" if "val_bits_per_byte" in record else ""
        self.console.say(f"step {self.run.step}: validation loss {record['val_loss']:.4f} nats per token{bits}")

    def save(self) -> None:
        run = self.run
        if self.feed.skipped is not None:
            self.count_skipped_samples(self.feed.skipped)
        path = write_checkpoint(
            run.folder.checkpoints,
            run.step,
            self.engine.state_pieces(),
            checkpoint_state(run),
            keep_last=run.config.checkpoint.keep_last,
        )
        self.console.say(f"step {run.step}: saved {path}")

    def close(self) -> None:
        self.feed.close()
        self.metrics.close()


def train(run: Run) -> None:
    """Train from `run.step` to the last step: report, guard, validate and save as the config says. Collective.

    Raises FloatingPointError (see Trainer.step), ReplicaError (see Trainer.guard), and CheckpointError when a
    checkpoint cannot be written.
    """
    trainer, config = Trainer(run), run.config

    def due(interval: int) -> bool:
        return run.step % interval == 0 or run.step == config.train.max_steps

    began, waited, reported = time.perf_counter(), 0.0, run.step
    with trainer.console:
        while run.step < config.train.max_steps:
            loss, lr, norm = trainer.step()
            if due(config.logging.interval):
                now, wait = time.perf_counter(), trainer.feed.wait_seconds
                trainer.report(loss, lr, norm, reported, now - began, wait - waited)
                began, waited, reported = now, wait, run.step
            validating, saving = due(config.train.eval_interval), due(config.checkpoint.interval)
            # What is saved was compared: else a checkpoint could keep what a failing rank wrote.
            guarding = config.train.guard_interval > 0 and (saving or due(config.train.guard_interval))
            if guarding:
                trainer.guard()
            if validating:
                trainer.validate()
            if saving:
                trainer.save()
            if guarding or validating or saving:  # the next step's time is its own
                began, waited, reported = time.perf_counter(), trainer.feed.wait_seconds, run.step
    trainer.close()
