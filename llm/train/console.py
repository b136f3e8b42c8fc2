"""Shows the progress of a training run: a bar on a terminal, else a line every few seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

SECONDS_BETWEEN_LINES = 5.0  # without a terminal


class Console:
    """Reports the steps of a run; silent on ranks that are not enabled.

    Args:
        first_step: steps done before this process.
        file: where to; None: the standard output.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        max_steps: int,
        first_step: int = 0,
        *,
        enabled: bool = True,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_steps, self.first_step, self.enabled, self.clock = max_steps, first_step, enabled, clock
        self.last_line = clock()
        self.left = TimeRemainingColumn(compact=True)
        self.terminal = Terminal(file=file)
        # The text takes what the counter and the bar leave, and is cut where it is too long.
        text = TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True))
        columns = MofNCompleteColumn(), BarColumn(10), self.left, text
        self.has_bar = enabled and self.terminal.is_terminal
        # The time left comes from the last 1,000 reports, however slow they are.
        settings = {"console": self.terminal, "expand": True, "get_time": clock, "speed_estimate_period": math.inf}
        self.progress = Progress(*columns, **settings, disable=not self.has_bar)
        self.task = self.progress.add_task("", total=max_steps, completed=first_step)

    def step(self, record: Mapping[str, Any]) -> None:
        """Report the metrics of a step (`Reporter.step`)."""
        now, step = self.clock(), record["step"]
        self.progress.update(self.task, completed=step, description=step_text(record))
        if self.has_bar:
            return
        edge = step in (self.first_step + 1, self.max_steps)
        if edge or now - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = now
            memory = record["memory_bytes"]
            in_gib = "" if memory is None else f"  memory {memory / 2**30:.2f} GiB"
            waiting = f"waiting for data {record['data_wait_share']:.1%}"
            left = self.left.render(self.progress.tasks[0])
            self.say(f"step {step}/{self.max_steps}  {left} left  {step_text(record)}  {waiting}{in_gib}")

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if self.enabled:
            self.terminal.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Console:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()


def step_text(record: Mapping[str, Any]) -> str:
    """The measures of a step; the first ones matter most, for a narrow terminal cuts the rest."""
    mfu = ""
    if record["mfu"] is not None:
        mfu = f"  MFU {record['mfu']:.1%} {record['mfu_formula']}, {record['mfu_non_causal']:.1%} non-causal"
        mfu += f"  HFU {record['hfu']:.1%}" if record["hfu"] > record["mfu"] else ""
    skipped = f"  skipped {record['skipped_steps']}" if record["skipped_steps"] else ""
    return (
        f"loss {record['loss']:.4f}  {record['tokens_per_second']:,.0f} tokens/s  "
        f"lr {record['lr']:.2e}  norm {record['grad_norm']:.2f}{skipped}  "
        f"{record['tflops']:.3g} TFLOP/s{mfu}"
    )
