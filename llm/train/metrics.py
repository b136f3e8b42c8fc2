"""What a run measures: metrics.jsonl, one line per logged step, and TensorBoard.

Floats keep their full precision. A number that is not known is null; one that is not finite is the
text "nan", "inf" or "-inf", which JSON has no number for and `float()` reads.
"""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from llm.config import RunConfig
from llm.config.phases import consumed_samples, consumed_tokens
from llm.plan import flops


@dataclass(frozen=True)
class Workload:
    """What the steps of a run are, phase by phase, for turning their time into rates."""

    config: RunConfig
    formula: flops.Formula
    """Of the FLOPs and the MFU (llm/plan/flops.py)."""
    peak_tflops: float | None
    """Of one device; None where it is not known."""
    world_size: int

    def flops(self, first: int, last: int) -> float:
        """FLOPs over all ranks of the steps after step `first`, up to step `last`.

        Documents that do not attend to one another spare some of attention's, which no formula here leaves out.
        """
        parts, total = self.config.phases, 0.0
        for phase, end in zip(parts, [*(later.first_step for later in parts[1:]), last], strict=True):
            steps = max(0, min(end, last) - max(first, phase.first_step))
            tokens = steps * phase.global_batch_size * phase.seq_len
            total += tokens * flops.flops_per_token(self.config.model, phase.seq_len, self.formula)
        return total


def workload(config: RunConfig, device: torch.device, world_size: int, formula: flops.Formula = "causal") -> Workload:
    """The workload of a run on `world_size` devices like `device`."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return Workload(config, formula, flops.peak_tflops(name, config.train.precision), world_size)


def step_record(
    work: Workload,
    *,
    step: int,
    since: int,
    loss: float,
    lr: float,
    grad_norm: float,
    skipped_steps: int,
    seconds: float,
    wait_seconds: float,
    memory_bytes: int,
) -> dict[str, Any]:
    """The metrics line of a step.

    Args:
        step: steps done, this one included.
        since: steps done at the last report.
        loss: nats per token, mean over the global batch.
        grad_norm: before clipping.
        skipped_steps: all so far, whose gradients overflowed.
        seconds: that the steps since then took together.
        wait_seconds: the part of them that this rank waited for data.
        memory_bytes: this rank's peak (`peak_memory`).
    """
    tokens = consumed_tokens(work.config.phases, step)
    tflops = flops.achieved_tflops(work.flops(since, step), seconds, work.world_size)
    return {
        "step": step,
        "samples": consumed_samples(work.config.phases, step),
        "tokens": tokens,
        "loss": loss,
        "lr": lr,
        "grad_norm": grad_norm,
        "tokens_per_second": (tokens - consumed_tokens(work.config.phases, since)) / seconds,
        "tflops": tflops,
        "mfu": flops.mfu(tflops, work.peak_tflops),
        "mfu_formula": work.formula,
        "data_wait_share": wait_seconds / seconds,
        "memory_bytes": memory_bytes,
        "skipped_steps": skipped_steps,
        "step_seconds": seconds / (step - since),
    }


def validation_record(step: int, loss: float, bytes_per_token: float | None) -> dict[str, Any]:
    """The metrics line of a validation after `step` steps.

    loss: nats per token; bytes_per_token: of the validation split's text, None where it is not known.
    """
    record = {"step": step, "val_loss": loss}
    if bytes_per_token is not None:
        record["val_bits_per_byte"] = loss / math.log(2) / bytes_per_token
    return record


def peak_memory(device: torch.device) -> int:
    """Peak bytes of this process: allocated on a GPU, resident on a CPU (Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class MetricsWriter:
    """Appends records to a JSONL file and to TensorBoard; on ranks that are not enabled, nothing.

    Args:
        path: of metrics.jsonl; it goes on after the lines it has.
        tensorboard: folder of the event files; None: none.
        first_step: steps done before; TensorBoard drops what an earlier process wrote beyond.
        enabled: whether this rank writes.
    """

    def __init__(self, path: Path, tensorboard: Path | None, *, first_step: int = 0, enabled: bool = True) -> None:
        self._file = _open_lines(path) if enabled else None
        self._events = None
        if enabled and tensorboard is not None:
            # It takes a second to import, which a rank that does not write can save.
            from torch.utils.tensorboard.writer import SummaryWriter

            self._events = SummaryWriter(str(tensorboard), purge_step=first_step + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        """Write one line, with `step` among its keys; it outlives the process once this returns."""
        if self._file is None:
            return
        self._file.write(json.dumps(json_ready(record), allow_nan=False) + "\n")
        self._file.flush()
        for name, value in scalars(record) if self._events is not None else ():
            assert self._events is not None
            group = "validation" if name.startswith("val_") else "train"
            self._events.add_scalar(f"{group}/{name}", value, record["step"])

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a record but its step, those of a mapping by "name/key"."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{key}", number) for key, number in value.items())
        elif name != "step" and isinstance(value, (int, float)):
            yield name, value


def json_ready(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with its non-finite floats as text."""
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }


def _open_lines(path: Path):
    """Open for appending whole lines: a last line that a crash tore stays by itself."""
    torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    file = path.open("a", encoding="utf-8")
    if torn:
        file.write("\n")
    return file
