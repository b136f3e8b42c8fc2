"""The training loop: batches in, steps, validation, metrics, checkpoints."""

from __future__ import annotations

import math
import time

from llm.checkpoint.writer import write_checkpoint
from llm.data.loader import Loader, open_loader, validation_batches
from llm.parallel.agreement import exchange_errors
from llm.train.console import Console
from llm.train.engines.base import StepResult, micro_batch
from llm.train.metrics import MetricsWriter
from llm.train.schedule import learning_rate
from llm.train.start import Run, checkpoint_state


def train(run: Run) -> None:
    """Train from `run.step` to the end: validates, reports and saves as the config says. Collective.

    Raises FloatingPointError when the loss is not finite (outside of fp16's skipped steps), CheckpointError when a
    checkpoint cannot be written.
    """
    config, engine = run.config, run.engine
    assert engine is not None, "the run is complete"
    G, T = config.train.global_batch_size, config.data.seq_len
    loader = open_loader(
        config, run.manifest, dp_rank=run.mesh.dp_rank, dp_size=run.mesh.dp_size, consumed=run.step * G
    )
    with MetricsWriter(run) as metrics, Console(run) as console:
        while run.step < config.train.max_steps:
            began = time.perf_counter()
            lr = learning_rate(config.optim, run.step, config.train.max_steps)
            engine.set_lr(lr)
            batches = loader.next_step()
            loss = engine.forward_backward([micro_batch(b, run.device) for b in batches], G * T)
            result = engine.step()
            run.step += 1
            check_finite(run.step, loss, result)
            metrics.step(loss, lr, result, seconds=time.perf_counter() - began)
            console.step(loss)
            after_step(run, metrics, console)
    loader.close()
