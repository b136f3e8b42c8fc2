"""A folder on a small disk of its own, which fills up. Mounting one takes root: else the test is skipped."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """Mount a disk of `size`, in the units of tmpfs (1000k), at a folder that exists."""
    if os.geteuid() != 0 or mounted(folder, f"size={size}") != 0:
        pytest.skip("mounting a small disk takes root")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def resize(folder: Path, size: str) -> None:
    """Make a small disk larger or smaller."""
    assert mounted(folder, f"remount,size={size}") == 0


def mounted(folder: Path, options: str) -> int:
    line = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(line, capture_output=True, check=False).returncode
