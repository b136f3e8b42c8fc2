"""Reports a training run to metrics.jsonl, TensorBoard, Weights & Biases and the console."""

from __future__ import annotations

import time
from collections import Counter
from functools import partial

import torch

from llm.plan.flops import peak_tflops
from llm.train.console import Console
from llm.train.gpu_state import GpuState, gpu_uuid
from llm.train.metrics import MetricsWriter, peak_memory, step_rates
from llm.train.start import Run
from llm.train.stragglers import Stragglers
from llm.train.wandb_run import WandbRun


class Reporter:
    """Measures the steps of a run; rank 0 alone writes and prints."""

    def __init__(self, run: Run) -> None:
        self.run, self.feed = run, run.feed
        tensorboard = run.folder.tensorboard if run.config.logging.tensorboard else None
        self.console = Console(run.config.train.max_steps, run.step, enabled=run.lead)
        self.say = self.console.say
        where = run.folder.metrics, tensorboard
        wandb = partial(WandbRun, run.folder.path, run.config) if run.config.logging.wandb else None
        self.metrics = MetricsWriter(*where, wandb=wandb, first_step=run.step, enabled=run.lead, say=self.say)
        device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "CPU"
        self.stragglers = Stragglers(run.ballot.group, run.heartbeat.hosts, self.say)
        self.peak_tflops = run.config.logging.peak_tflops or peak_tflops(device, run.config.train.precision)
        self.gpu = GpuState(gpu_uuid(run.device), self.say)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Measure from here on: what came between steps is not part of the next one's time."""
        self.start, self.waited, self.since = time.perf_counter(), self.feed.wait_seconds, self.run.step
        self.exposed = Counter[str]()
        """Seconds of waits in collectives, by group, of the steps that were read."""

    def step(self, loss: float, lr: float, grad_norm: float, skipped_steps: int) -> None:
        """Report the step just made, and the rates of all steps since the clock was started. Collective.

        loss: nats per token, mean over the global batch; grad_norm: before clipping; skipped_steps: of the whole run.
        """
        run, seconds = self.run, time.perf_counter() - self.start
        record = step_rates(
            run.config, self.since, run.step, seconds, world_size=run.mesh.world_size, peak_tflops=self.peak_tflops
        ) | {
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "skipped_steps": skipped_steps,
            "data_wait_seconds": (self.feed.wait_seconds - self.waited) / (run.step - self.since),
            "data_wait_share": (self.feed.wait_seconds - self.waited) / seconds,
            "memory_bytes": peak_memory(run.device),
        }
        if self.exposed:
            steps = run.step - self.since
            record["exposed_collective_seconds"] = {group: seconds / steps for group, seconds in self.exposed.items()}
        record |= self.stragglers.report(run.step, record["step_seconds"], self.gpu.read())
        self.restart_clock()
        record |= self.feed.record() | self.gpu.record()
        self.metrics.write(record)
        self.console.step(record)
        if run.engine.compiled is not None and (news := run.engine.compiled.news()) is not None:
            self.say(f"step {run.step}: {news}")

    def validation(self, measures: dict[str, float]) -> None:
        """Report what was measured after the steps made so far: `val_loss`, in nats per token, and maybe more."""
        loss, *others = measures.values()
        bits = self.run.source.bits_per_byte(loss)
        known = {} if bits is None else {"val_bits_per_byte": bits}
        self.metrics.write({"step": self.run.step} | measures | known)
        in_bits = "" if bits is None else f", {bits:.4f} bits per byte"
        more = "".join(
            f", {name.removeprefix('val_')} {x:.4f}" for name, x in zip([*measures][1:], others, strict=True)
        )
        self.say(f"step {self.run.step}: validation loss {loss:.4f} nats per token{in_bits}{more}")
