"""One measurement of one loader, in a process of its own that has done nothing before but import it."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.loader.cases import STEP_SECONDS, Case, Scale
from benchmarks.loader.check import check, check_gather
from benchmarks.loader.gather import Gather
from benchmarks.loader.process import Memory, cpu_seconds, descendants, drop, populate, shared_names, warm
from benchmarks.loader.system import Batch, Job, System
from benchmarks.loader.systems import SYSTEMS, build
from benchmarks.loader.tokens import TokenSet

FEWEST = 2  # batches timed, however long they take
Figures = dict[str, Any]


def prepare(name: str, case: Case, scale: Scale, folder: Path) -> Figures:
    """Convert the tokens of a case into what the loader reads."""
    began = time.perf_counter()
    build(name).prepare(case.token_set(scale, folder), case.seq_len)
    return {"prepared_seconds": time.perf_counter() - began}


def measure(name: str, case: Case, scale: Scale, folder: Path) -> Figures:
    """The figures of a case; what a check finds wrong is under `wrong`."""
    system, tokens, job = build(name), case.token_set(scale, folder), case.job(scale)
    system.begin()
    if job.workers:  # processes beside the training one are meant for other cores
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    if case.task == "check":
        if isinstance(system, Gather):
            wrong = check_gather(system, tokens, job)
        else:
            with closing(system.open(tokens, job)) as batches:
                wrong = check(SYSTEMS[name].rows, tokens, job, batches)
        return {"wrong": wrong} if wrong else {}
    if case.fresh:
        system.forget(tokens)
    if not case.huge:
        (drop if case.cold else warm)(system.files(tokens, job.seq_len))
    if isinstance(system, Gather):
        return _gathered(system.rate(tokens, job, scale.seconds, not case.cold))
    state = None
    if case.resume:
        state = system.state(tokens, job, (tokens.tokens - 1) // job.seq_len // 2 // job.rows * job.rows)
    return _timed(system, tokens, job, state, case, scale)


def _timed(system: System, tokens: TokenSet, job: Job, state: Any, case: Case, scale: Scale) -> Figures:
    names = shared_names()
    gc.collect()
    memory = Memory()
    began = time.perf_counter()
    with closing(system.open(tokens, job, state)) as batches:
        next(batches)
        found: Figures = {"first_seconds": time.perf_counter() - began}
        if case.task == "rate" and not case.cold:
            populate(tokens.folder)
        if case.task == "rate":
            found |= _rate(batches, job, scale.seconds, case.cold)
        elif case.task == "wait":
            found |= _wait(batches, scale.wait_steps)
        found |= memory.taken()
        found["processes"] = len(descendants(os.getpid()))
        found["shared_names"] = len(shared_names() - names)
    return found


def _rate(batches: Iterator[Batch], job: Job, seconds: float, cold: bool) -> Figures:
    """Tokens per second and latencies. With a warm cache, what comes in the first part of the time is not timed."""
    if not cold:
        until = time.perf_counter() + seconds / 3
        while time.perf_counter() < until:
            next(batches)
    gc.collect()
    took = []
    cpu = cpu_seconds()
    now = began = time.perf_counter_ns()
    while now - began < seconds * 1e9 or len(took) < FEWEST:
        next(batches)
        after = time.perf_counter_ns()
        took.append(after - now)
        now = after
    cpu = cpu_seconds() - cpu
    count = len(took) * job.rows * job.seq_len
    p50, p99 = np.percentile(took, [50, 99]) / 1e6
    return {
        "tokens": count,
        "seconds": (now - began) / 1e9,
        "tokens_s": count / (now - began) * 1e9,
        "cpu_s_per_gtoken": cpu / count * 1e9,
        "p50_ms": float(p50),
        "p99_ms": float(p99),
        "max_ms": max(took) / 1e6,
    }


def _gathered(run: Figures) -> Figures:
    return {
        "tokens": run["tokens"],
        "seconds": run["seconds"],
        "tokens_s": run["tokens"] / run["seconds"],
        "cpu_s_per_gtoken": run["cpu_seconds"] / run["tokens"] * 1e9,
    }


def _wait(batches: Iterator[Batch], steps: int) -> Figures:
    """How long a training loop waits that works for STEP_SECONDS a step on a device, the CPU being idle."""
    waited, began = 0.0, time.perf_counter()
    for _ in range(steps):
        time.sleep(STEP_SECONDS)
        asked = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - asked
    return {"wait_share": waited / (time.perf_counter() - began), "wait_ms": waited / steps * 1e3}
