"""The built-in corpus: the Python standard library's own source files."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from llm.errors import InputError

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def stdlib_files() -> list[Path]:
    """Every .py file of the standard library but its tests and installed packages, sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    found = sorted(
        (path for path in root.rglob("*.py") if path.is_file() and not LEFT_OUT & set(path.relative_to(root).parts)),
        key=lambda path: path.relative_to(root).as_posix(),
    )
    if not found:
        raise InputError(
            f"the Python standard library has no source files in {root}; "
            "use another Python or set data.source to a text file or folder"
        )
    return found
