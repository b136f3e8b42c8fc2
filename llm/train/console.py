"""Shows the progress of a training run: a bar on a terminal, else a line every few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column


class Console:
    """Reports the steps of a run; silent on ranks that are not enabled.

    Args:
        max_steps: of the run.
        first_step: steps done before this process.
        enabled: whether this rank reports.
        file: where to; None: the standard output.
        seconds_between_lines: without a terminal.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        max_steps: int,
        first_step: int = 0,
        *,
        enabled: bool = True,
        file: TextIO | None = None,
        seconds_between_lines: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_steps, self.first_step, self.enabled = max_steps, first_step, enabled
        self.file = file or sys.stdout
        self.seconds_between_lines = seconds_between_lines
        self.clock = clock
        self.start = self.last_line = clock()
        self.progress: Progress | None = None
        terminal = Terminal(file=self.file)
        if enabled and terminal.is_terminal:
            # The text takes what the counter and the bar leave, and is cut where it is too long.
            text = TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True))
            self.progress = Progress(MofNCompleteColumn(), BarColumn(10), text, console=terminal, expand=True)
            self.task = self.progress.add_task("", total=max_steps, completed=first_step)

    def step(self, record: Mapping[str, Any]) -> None:
        """Report the metrics of a step (`Reporter.step`)."""
        if not self.enabled:
            return
        now, step = self.clock(), record["step"]
        left = (now - self.start) / max(1, step - self.first_step) * (self.max_steps - step)
        text = f"{clock_text(left)} left  {step_text(record)}"
        if self.progress is not None:
            self.progress.update(self.task, completed=step, description=text)
            return
        edge = step in (self.first_step + 1, self.max_steps)
        if edge or now - self.last_line >= self.seconds_between_lines:
            self.last_line = now
            waiting, memory = record["data_wait_share"], record["memory_bytes"] / 2**30
            more = f"waiting for data {waiting:.1%}  memory {memory:.2f} GiB"
            self.say(f"step {step}/{self.max_steps}  {text}  {more}")

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if not self.enabled:
            return
        if self.progress is not None:
            self.progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self.file, flush=True)

    def __enter__(self) -> Console:
        if self.progress is not None:
            self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.progress is not None:
            self.progress.stop()


def step_text(record: Mapping[str, Any]) -> str:
    """The measures of a step; the first ones matter most, for a narrow terminal cuts the rest."""
    mfu = "n/a" if record["mfu"] is None else f"{record['mfu']:.1%} ({record['mfu_formula']})"
    skipped = f"  skipped {record['skipped_steps']}" if record["skipped_steps"] else ""
    return (
        f"loss {record['loss']:.4f}  {record['tokens_per_second']:,.0f} tokens/s  "
        f"lr {record['lr']:.2e}  norm {record['grad_norm']:.2f}{skipped}  "
        f"{record['tflops']:.3g} TFLOP/s  MFU {mfu}"
    )


def clock_text(seconds: float) -> str:
    """59 -> "0:59", 3661 -> "1:01:01"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
