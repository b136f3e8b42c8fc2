"""Says in whose code the host is while a step runs: by package, as cProfile counts."""

from __future__ import annotations

import cProfile
import pstats
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUILTIN = "~"  # what cProfile calls the file of a function in C


def package_of(file: str) -> str:
    """The top-level package of a source file; "python" for the standard library and what is not in a file."""
    path = Path(file)
    if "site-packages" in path.parts:
        return path.parts[path.parts.index("site-packages") + 1].removesuffix(".py")
    return path.relative_to(ROOT).parts[0] if path.is_relative_to(ROOT) else "python"


def by_package(step: Callable[[], Any], count: int) -> dict[str, float]:
    """CPU-seconds of this thread in the functions of each package, of one of `count` steps. C code is its caller's.

    cProfile adds about a microsecond to each call, so code of many small functions is overstated.
    """
    profiler = cProfile.Profile(time.thread_time)
    profiler.enable()
    for _ in range(count):
        float(step())
    profiler.disable()
    found: dict[str, float] = defaultdict(float)
    stats: dict[Any, Any] = pstats.Stats(profiler).stats  # pyright: ignore[reportAttributeAccessIssue]
    for (file, _, _), (_, _, own, _, callers) in stats.items():
        if file != BUILTIN:
            found[package_of(file)] += own / count
        for (caller, _, _), (_, _, own_for_it, _) in callers.items() if file == BUILTIN else ():
            found["python" if caller == BUILTIN else package_of(caller)] += own_for_it / count
    return dict(found)
