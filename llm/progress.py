"""The progress bar of long work on files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import progress
from rich.console import Console


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr, gone afterwards: called with a stage's name, and the bytes done and in all (0: unknown)."""
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=None)
        shown = ""

        def show(stage: str, done: int, total: int) -> None:
            nonlocal shown
            if stage != shown:  # what was done before is no speed
                bar.reset(task, description=stage, completed=done, total=total or None)
                shown = stage
            bar.update(task, completed=done, total=total or None)

        yield show
