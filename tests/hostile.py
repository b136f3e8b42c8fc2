"""What a refusal of hostile input may take: 5 seconds and 200 MB, and nothing is written outside a folder."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest

SECONDS, KILOBYTES = 5, 200_000


@contextmanager
def bounded() -> Iterator[None]:
    """Fail unless the block ends within SECONDS and this process's peak memory grows by less than KILOBYTES."""

    def late(*_: object) -> NoReturn:
        pytest.fail(f"took more than {SECONDS} s")  # no Exception: what is under test cannot take it for its own

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    handler = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < KILOBYTES


def contents(folder: Path) -> dict[str, object]:
    """All below a folder: path -> the bytes of a file, the target of a link, or None."""
    found = sorted(folder.rglob("*"))
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else (path.read_bytes() if path.is_file() else None)
        for path in found
    }
