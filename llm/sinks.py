"""The places that reports go to: a terminal, metrics.jsonl, TensorBoard, loss.png. Each may fail; the work may not.

A report is what a run says of itself. What was asked for, such as a checkpoint, is none: it fails loudly.
"""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Callable
from typing import TextIO, TypeAlias, TypeVar

T = TypeVar("T")
Say: TypeAlias = Callable[[str], None]


class Sink:
    """A place that reports go to. When it fails, `say` gets a warning, once, and no more is sent there."""

    failure: Exception | None = None

    def __init__(self, name: str, say: Say) -> None:
        self.name, self.say = name, say

    def __call__(self, report: Callable[[], T]) -> T | None:
        """What `report` returns; None where it fails, or an earlier one failed."""
        if self.failure is None:
            try:
                return report()
            # Whatever it is: a library that draws, where it is broken, may raise anything.
            except Exception as error:  # noqa: BLE001
                self.failure = error
                self.say(f"warning: {self.name} is left out from here on: {type(error).__name__}: {error}")
        return None


class Stream(io.FileIO):
    """A standard stream: it takes all that is printed, and drops it once it has failed."""

    def __init__(self, descriptor: int, name: str, say: Say) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.sink = Sink(name, say)

    def write(self, data: bytes | memoryview, /) -> int:
        view = memoryview(data).cast("B")
        self.sink(lambda: self._write(view))
        return len(view)

    def _write(self, view: memoryview) -> None:
        while len(view):
            select.select([], [self], [])  # what started this process may have made the descriptor non-blocking
            view = view[super().write(view) or 0 :]


def protect_streams() -> None:
    """Make standard output and error take every character, a closed pipe and a full disk. A script calls it first."""
    sys.stderr = _protected(sys.stderr, "standard error", lambda warning: None)
    sys.stdout = _protected(sys.stdout, "standard output", lambda warning: print(warning, file=sys.stderr))


def _protected(stream: TextIO | None, name: str, say: Say) -> TextIO:
    if stream is None:  # it was closed before Python began
        return open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")
    raw, lines = Stream(stream.fileno(), name, say), stream.line_buffering
    options = {"line_buffering": lines, "write_through": getattr(stream, "write_through", False)}
    return io.TextIOWrapper(raw, stream.encoding, "backslashreplace", **options)  # pyright: ignore[reportArgumentType]


def output_failure() -> Exception | None:
    """Why the standard output, once protected, takes no more; None while it does."""
    raw = getattr(sys.stdout, "buffer", None)
    return raw.sink.failure if isinstance(raw, Stream) else None
