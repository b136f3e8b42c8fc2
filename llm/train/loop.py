"""The training loop: batches in, steps, validation, metrics, checkpoints."""

from __future__ import annotations

import math
import time

from llm.checkpoint.writer import write_checkpoint
from llm.parallel.agreement import exchange_errors
from llm.train.console import Console
from llm.train.engines.base import micro_batch
from llm.train.metrics import MetricsWriter, peak_memory, step_record, validation_record, workload
from llm.train.schedule import learning_rate
from llm.train.start import Run, checkpoint_state


class Trainer:
    """A run under way: what its steps share."""

    def __init__(self, run: Run) -> None:
        assert run.engine is not None, "the run is complete"
        assert run.loader is not None
        config = run.config
        self.run, self.engine, self.loader = run, run.engine, run.loader
        self.work = workload(config, run.device, run.mesh.world_size)
        tensorboard = run.folder.tensorboard if config.logging.tensorboard else None
        self.metrics = MetricsWriter(run.folder.metrics, tensorboard, first_step=run.step, enabled=run.lead)
        self.console = Console(config.train.max_steps, run.step, enabled=run.lead)
        self.skipped_steps = run.step - self.engine.scalar_state()["optimizer_step"]

    def step(self) -> tuple[float, float, float]:
        """One optimizer step; returns its loss, learning rate and gradient norm.

        Raises FloatingPointError, on every rank, when the loss or the norm is not finite and nothing was skipped.
        """
        config, run = self.run.config, self.run
        lr = learning_rate(config.optim, run.step, config.train.max_steps)
        self.engine.set_lr(lr)
        batches = [micro_batch(batch, run.device) for batch in self.loader.next_step()]
        loss = self.engine.forward_backward(batches, self.work.tokens)
        result = self.engine.step()
        run.step += 1
        self.skipped_steps += result.skipped
        if not result.skipped and not (math.isfinite(loss) and math.isfinite(result.grad_norm)):
            raise FloatingPointError(
                f"step {run.step}: loss {loss}, gradient norm {result.grad_norm}; the checkpoints from before are "
                "whole: lower optim.lr or optim.grad_clip, or look at the data, and start again"
            )
        return loss, lr, result.grad_norm

    def report(self, loss: float, lr: float, grad_norm: float, seconds: float, waited: float) -> None:
        record = step_record(
            self.work,
            step=self.run.step,
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            skipped_steps=self.skipped_steps,
            seconds=seconds,
            wait_seconds=waited,
            memory_bytes=peak_memory(self.run.device),
        )
        self.metrics.write(record)
        self.console.step(record)

    def validate(self) -> None:
        batches = (micro_batch(batch, self.run.device, rows) for batch, rows in self.run.validation_batches())
        total, count = self.engine.evaluate(batches)
        record = validation_record(self.run.step, total / count, self.run.manifest.bytes_per_token)
        self.metrics.write(record)
        self.console.say(
            f"step {self.run.step}: validation loss {record['val_loss']:.4f} nats per token, "
            f"{record['val_bits_per_byte']:.4f} bits per byte"
        )

    def save(self) -> None:
        run = self.run
        path = write_checkpoint(
            run.folder.checkpoints,
            run.step,
            self.engine.state_pieces(),
            checkpoint_state(run),
            rank=run.mesh.rank,
            world=run.mesh.world_size,
            keep_last=run.config.checkpoint.keep_last,
            exchange_errors=exchange_errors,
        )
        self.console.say(f"step {run.step}: saved {path}")

    def close(self) -> None:
        self.loader.close()
        self.metrics.close()


def train(run: Run) -> None:
    """Train from `run.step` to the last step: report, validate and save as the config says. Collective.

    Raises FloatingPointError (see Trainer.step), and CheckpointError when a checkpoint cannot be written.
    """
    trainer, config = Trainer(run), run.config
    last = config.train.max_steps
    began, waited, reported = time.perf_counter(), 0.0, run.step
    with trainer.console:
        while run.step < last:
            loss, lr, norm = trainer.step()
            if run.step % config.logging.interval == 0 or run.step == last:
                steps, now = run.step - reported, time.perf_counter()
                wait = trainer.loader.wait_seconds - waited
                trainer.report(loss, lr, norm, (now - began) / steps, wait / steps)
                began, waited, reported = now, trainer.loader.wait_seconds, run.step
            validated = run.step % config.train.eval_interval == 0 or run.step == last
            if validated:
                trainer.validate()
            if run.step % config.checkpoint.interval == 0 or run.step == last:
                trainer.save()
                validated = True
            if validated:  # the next step's time is its own
                began, waited, reported = time.perf_counter(), trainer.loader.wait_seconds, run.step
    trainer.close()
