"""Makes one measurement of one loader, in a process that has done nothing but import it."""

import gc
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.loader.cases import Case, Scale
from benchmarks.loader.check import check
from benchmarks.loader.process import Memory, drop, populate, warm
from benchmarks.loader.system import Batch
from benchmarks.loader.systems import SYSTEMS, build

FEWEST = 2  # batches timed, however long they take
Figures = dict[str, Any]


def prepare(name: str, case: Case, scale: Scale, folder: Path) -> Figures:
    """Convert the tokens of a case into what the loader reads."""
    build(name).prepare(case.token_set(scale, folder), case.seq_len)
    return {}


def measure(name: str, case: Case, scale: Scale, folder: Path) -> Figures:
    """The figures of a case; what a check finds wrong is under `wrong`."""
    system, tokens = build(name), case.token_set(scale, folder)
    system.begin()
    if case.task == "check":
        with closing(system.open(tokens, case)) as batches:
            wrong = check(SYSTEMS[name].rows, tokens, case, batches)
        return {"wrong": wrong} if wrong else {}
    if not case.huge:
        (drop if case.cold else warm)(system.files(tokens, case.seq_len))
    state = None
    if case.resume:
        state = system.state(tokens, case, (tokens.tokens - 1) // case.seq_len // 2 // case.rows * case.rows)
    gc.collect()
    memory = Memory()
    began = time.perf_counter()
    with closing(system.open(tokens, case, state)) as batches:
        next(batches)
        found: Figures = {"first_seconds": time.perf_counter() - began}
        if case.task == "rate":
            if not case.cold:
                populate(tokens.folder)
                until = time.perf_counter() + scale.seconds / 3
                while time.perf_counter() < until:
                    next(batches)
            found |= _rate(batches, case, scale.seconds)
        return found | memory.taken()


def _rate(batches: Iterator[Batch], case: Case, seconds: float) -> Figures:
    """Tokens per second, CPU time and latencies."""
    gc.collect()
    latencies = []
    cpu = time.process_time()
    now = began = time.perf_counter_ns()
    while now - began < seconds * 1e9 or len(latencies) < FEWEST:
        next(batches)
        after = time.perf_counter_ns()
        latencies.append(after - now)
        now = after
    cpu = time.process_time() - cpu
    count = len(latencies) * case.rows * case.seq_len
    p50, p99 = np.percentile(latencies, [50, 99]) / 1e6
    return {
        "tokens_s": count / (now - began) * 1e9,
        "cpu_s_per_gtoken": cpu / count * 1e9,
        "p50_ms": float(p50),
        "p99_ms": float(p99),
        "max_ms": max(latencies) / 1e6,
    }
