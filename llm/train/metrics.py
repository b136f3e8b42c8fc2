"""Writes metrics.jsonl, one line per logged step, TensorBoard events, and a W&B run.

Floats keep their full precision. A number that is not known is null. One that is not finite is the
text "nan", "inf" or "-inf", which JSON has no number for and `float()` reads.
"""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llm.config import RunConfig
from llm.config.phases import consumed_samples, consumed_tokens
from llm.files import open_own, write_all
from llm.plan import flops
from llm.sinks import Say, Sink
from llm.train.wandb_run import WandbRun

FORMULA: flops.Formula = "causal"  # of the FLOPs and the MFU


def step_rates(
    config: RunConfig, since: int, step: int, seconds: float, *, world_size: int, peak_tflops: float | None
) -> dict[str, Any]:
    """What the run has done after `step` steps, and its rates when the steps after `since` took `seconds` together.

    peak_tflops: of one device; None where it is not known. Shares of it, in [0, 1]: `mfu` of the model's FLOPs by
    `mfu_formula`, `mfu_non_causal` by that of most published figures, `hfu` of what is computed, by `mfu_formula` and
    with what activation checkpointing computes again.
    """
    tokens = consumed_tokens(config.phases, step)

    def tflops(formula: flops.Formula, *, recomputed: bool = False) -> float:  # of one device
        work = flops.flops_of_steps(config, since, step, formula, recomputed=recomputed)
        return work / seconds / world_size / 1e12

    used = {"mfu": tflops(FORMULA), "mfu_non_causal": tflops("non-causal"), "hfu": tflops(FORMULA, recomputed=True)}
    return {
        "step": step,
        "samples": consumed_samples(config.phases, step),
        "tokens": tokens,
        "tokens_per_second": (tokens - consumed_tokens(config.phases, since)) / seconds,
        "tflops": used["mfu"],
        **{name: None if peak_tflops is None else rate / peak_tflops for name, rate in used.items()},
        "mfu_formula": FORMULA,
        "step_seconds": seconds / (step - since),
    }


def peak_memory(device: torch.device) -> int | None:
    """Peak bytes of this process: allocated on a GPU, resident on a CPU (Linux); None where the system counts none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 or None


class MetricsWriter:
    """Appends records to a JSONL file, TensorBoard and Weights & Biases; on ranks that are not enabled, nothing.

    Args:
        path: of metrics.jsonl; it goes on after the lines it has.
        tensorboard: folder of the event files; None: none.
        wandb: opens the W&B run; None: none.
        first_step: steps done before; TensorBoard drops what an earlier process wrote beyond.
        say: gets a warning when one of these can no longer be written; the others go on.
    """

    def __init__(
        self,
        path: Path,
        tensorboard: Path | None,
        *,
        wandb: Callable[[], WandbRun] | None = None,
        first_step: int = 0,
        enabled: bool = True,
        say: Say = print,
    ) -> None:
        self._to_file, self._to_events = Sink(str(path), say), Sink("TensorBoard", say)
        self._to_wandb = Sink("Weights & Biases", say)
        # Unbuffered: after a full disk nothing is left that closing the file would write.
        self._file = self._to_file(lambda: open_own(path, "a")) if enabled else None
        folder = tensorboard if enabled else None
        self._events = self._to_events(lambda: open_events(folder, first_step + 1)) if folder is not None else None
        self._wandb = self._to_wandb(wandb) if wandb is not None and enabled else None

    def write(self, record: Mapping[str, Any]) -> None:
        """Write one line, with `step` among its keys; it outlives the process once this returns."""
        file, events, wandb = self._file, self._events, self._wandb
        if file is not None:
            finite = {key: str(x) if isinstance(x, float) and not math.isfinite(x) else x for key, x in record.items()}
            line = (json.dumps(finite, allow_nan=False) + "\n").encode()
            self._to_file(lambda: write_all(file.fileno(), memoryview(line)))
        if events is not None:
            for name, value in scalars(record):
                self._to_events(partial(events.add_scalar, name, value, record["step"]))
        if wandb is not None:
            self._to_wandb(lambda: wandb.write(dict(scalars(record)), record["step"]))

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *error: object) -> None:
        for sink, file in ((self._to_file, self._file), (self._to_events, self._events)):
            if file is not None:
                sink(file.close)
        if (wandb := self._wandb) is not None:
            self._to_wandb(lambda: wandb.close(failed=error[0] is not None))


def open_events(folder: Path, first_step: int) -> Any:
    """A SummaryWriter of TensorBoard's events from `first_step` on."""
    # It takes a second to import, which a rank that does not write can save.
    from torch.utils.tensorboard.writer import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first_step)


def scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a record but its step, as "train/name" or "validation/name", those of a mapping "name/key"."""
    for name, value in record.items():
        name = f"{'validation' if name.startswith('val_') else 'train'}/{name}"
        if isinstance(value, Mapping):
            yield from ((f"{name}/{key}", x) for key, x in value.items() if isinstance(x, (int, float)))
        elif name != "train/step" and isinstance(value, (int, float)):
            yield name, value
