"""Times training steps of the same model by Ingot and by others, in turns in one run, and prints a table.

On a CPU: the tiny config, and the same sizes as a GPT-2, one thread a process; what counts is CPU-seconds, of all ranks
together. On a GPU: 124M and 350M in bf16. Batches are random tokens, on the device before a step begins. Each step ends
with a look at its loss. The plain peer of a shape is its base: ratios are paired by round, with a 95 % interval.
"""

import argparse
import contextlib
import gc
import math
import multiprocessing as mp
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from benchmarks.clock import alternate
from benchmarks.contenders import (
    COMPILED,
    FORMS,
    LAYOUTS,
    LIGER,
    PLAIN,
    SIZES,
    TRANSFORMERS,
    TWO_RANKS,
    Step,
    absent,
    config_of,
    is_compiled,
    make,
)  # fmt: skip
from benchmarks.host import by_package
from benchmarks.layout.counters import LiveStorages
from benchmarks.report import NONE, header, heading, table
from llm.cluster.ranks import Ranks, export, free_port, initialize
from llm.config import RunConfig
from llm.plan.flops import flops_per_token, peak_tflops

PACKAGES = ("torch", "deepspeed", "transformers", "liger-kernel")
WARM_UP, TIMEOUT_SECONDS = 3, 600


class Turn(NamedTuple):
    """Of one step, on average over a turn of a contender."""

    cpu: float
    """Seconds of the processors, all ranks together."""
    wall: float
    loss: float


class Made(NamedTuple):
    """Of a contender."""

    memory: int
    """The most bytes of tensors alive, on rank 0."""
    communication: float
    """Seconds of a step in collectives of rank 0, waits for the other rank among them."""
    start: float
    """Seconds until it was built and had made two steps."""


@contextlib.contextmanager
def peak(device: torch.device, found: list[int]) -> Iterator[None]:
    """Appends the most bytes of tensors that were alive inside, of those made inside."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield
        found.append(torch.cuda.max_memory_allocated(device) - before)
    else:
        with LiveStorages(existing=False) as memory:
            yield
        found.append(memory.peak)


def in_collectives(step: Step) -> float:
    """Seconds of a step in collectives."""
    steps = 3
    with torch.profiler.profile() as profiled:
        for _ in range(steps):
            float(step())
    events = [event for event in profiled.events() or () if event.name.startswith(("gloo:", "nccl:"))]
    return sum(event.time_range.elapsed_us() for event in events) / steps / 1e6


class Contenders:
    """Those of a process that have been made."""

    def __init__(self, device: torch.device, ranks: int) -> None:
        self.device, self.ranks, self.steps = device, ranks, dict[str, Step]()

    def make(self, name: str, contender: str, config: RunConfig) -> Made:
        gc.collect()
        found, began = list[int](), time.perf_counter()
        # The counter and torch.compile do not go together on a CPU.
        counts = self.device.type == "cuda" or not is_compiled(contender)
        with peak(self.device, found) if counts else contextlib.nullcontext(found.append(0)):
            self.steps[name] = make(contender, config, self.device, self.ranks)
            for _ in range(2):
                float(self.steps[name]())
        start = time.perf_counter() - began
        for _ in range(WARM_UP):
            float(self.steps[name]())
        return Made(found[0], in_collectives(self.steps[name]) if self.ranks > 1 else 0.0, start)

    def host(self, name: str, count: int) -> dict[str, float]:
        """Seconds of a step in the code of each package (benchmarks/overhead.py)."""
        return by_package(self.steps[name], count)

    def turn(self, name: str, count: int) -> Turn:
        step, loss = self.steps[name], 0.0
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(count):
            loss = float(step())
        return Turn((time.process_time() - cpu) / count, (time.perf_counter() - wall) / count, loss)


def serve(rank: int, size: int, port: int, threads: int, connection: Any) -> None:
    """A rank's main loop: receive a method of Contenders and its arguments, send what it returns, or why it failed."""
    ranks = Ranks(rank, rank, size, size, "127.0.0.1", port, "benchmark")
    export(ranks, os.environ)
    torch.set_num_threads(threads)
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    os.dup2(2, 1)  # what DeepSpeed prints is no part of the table
    initialize(ranks, timeout_seconds=TIMEOUT_SECONDS, device=device)
    contenders = Contenders(device, size)
    while (asked := connection.recv()) is not None:
        method, *arguments = asked
        try:
            connection.send(getattr(contenders, method)(*arguments))
        except Exception as error:  # noqa: BLE001 - whatever it was, the other contenders go on
            connection.send(f"{type(error).__name__}: {error}".split("\n")[0])
    dist.destroy_process_group()


class Process:
    """`size` ranks that hold contenders."""

    def __init__(self, size: int, threads: int) -> None:
        context, port = mp.get_context("spawn"), free_port()
        pipes = [context.Pipe() for _ in range(size)]
        self.connections = [ours for ours, _ in pipes]
        self.ranks = [
            context.Process(target=serve, args=(rank, size, port, threads, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self.ranks:
            process.start()

    def ask(self, *asked: Any) -> list[Any]:
        """What each rank answers; raises RuntimeError if one has failed, EOFError if it has died."""
        for connection in self.connections:
            connection.send(asked)
        answers = [connection.recv() for connection in self.connections]
        if failed := [answer for answer in answers if isinstance(answer, str)]:
            raise RuntimeError(failed[0])
        return answers

    def close(self) -> None:
        for connection, process in zip(self.connections, self.ranks, strict=True):
            connection.send(None)
            process.join(30)
            process.kill()


class Ratio(NamedTuple):
    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.2f} ({self.low:.2f} to {self.high:.2f})"


# Student's t, 97.5 %, by degrees of freedom.
T_975 = (math.inf, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


def paired(ours: Sequence[float], base: Sequence[float]) -> Ratio:
    """The geometric mean of ours / base, round by round, and its 95 % interval."""
    logs = [math.log(a / b) for a, b in zip(ours, base, strict=True)]
    middle, n = statistics.fmean(logs), len(logs)
    margin = T_975[min(n - 1, len(T_975) - 1)] * statistics.stdev(logs) / math.sqrt(n) if n > 1 else math.inf
    return Ratio(*(math.exp(x) for x in (middle, middle - margin, middle + margin)))


def rows(config: RunConfig, turns: Mapping[str, list[Turn]], made: Mapping[str, Made], gpu: str | None) -> list[Any]:
    """The table's rows of a shape."""
    tokens = config.train.global_batch_size * config.data.seq_len
    peak_rate = peak_tflops(gpu, config.train.precision) if gpu else None
    found = []
    for name, measured in turns.items():
        wall, cpu = (statistics.median(getattr(turn, kind) for turn in measured) for kind in ("wall", "cpu"))
        kind = "wall" if gpu else "cpu"
        of, base = ([getattr(turn, kind) for turn in turns[key]] for key in (name, PLAIN))
        rate = tokens / wall
        mfu = flops_per_token(config.model, config.data.seq_len) * rate / peak_rate / 1e12 if peak_rate else None
        memory, communication, start = made[name]
        found.append([
            name, f"{wall * 1e3:.1f}", NONE if gpu else f"{cpu * 1e3:.1f}", f"{rate:,.0f}",
            NONE if mfu is None else f"{mfu:.1%}", f"{memory / 2**20:,.1f}" if memory else NONE,
            f"{communication * 1e3:.1f}" if communication else NONE, f"{start:.1f}", str(paired(of, base)),
        ])  # fmt: skip
    return found


def measure(config: RunConfig, names: Sequence[str], rounds: int, steps: int) -> tuple[list[Any], list[str]]:
    """The rows of a shape, and what is left out, and why."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    left_out, places = list[str](), dict[tuple[int, bool], Process]()
    process_of, made, turns = dict[str, Process](), dict[str, Made](), dict[str, list[Turn]]()
    for name in names:
        ranks = 2 if name in TWO_RANKS else 1
        reason = absent(name, config, device, ranks)
        if reason is None:
            key = ranks, name == LIGER
            process = places[key] = places.get(key) or Process(ranks, 1)
            try:
                made[name] = process.ask("make", name, name, config)[0]
                process_of[name], turns[name] = process, []
            except RuntimeError as error:
                reason = str(error)
        left_out += [] if reason is None else [f"{name}: {reason}"]
        print(f"{name}: {reason or 'made'}", file=sys.stderr, flush=True)
    for name in alternate(list(turns), rounds):
        answers = process_of[name].ask("turn", name, steps)
        turns[name].append(Turn(sum(a.cpu for a in answers), answers[0].wall, answers[0].loss))
    for process in places.values():
        process.close()
    return rows(config, turns, made, torch.cuda.get_device_name() if on_gpu else None), left_out


HEAD = ["", "ms", "CPU-ms", "tokens/s", "MFU", "MiB of tensors", "in collectives, ms", "start, s", "against plain"]


def main(arguments: list[str]) -> None:
    on_gpu = torch.cuda.is_available()
    known = [*LAYOUTS, *TWO_RANKS, PLAIN, COMPILED, TRANSFORMERS, LIGER]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=10, help="steps of a turn")
    parser.add_argument("--batch", type=int, default=16 if on_gpu else 32, help="samples of a step, over all ranks")
    sizes = ["124M", "350M"] if on_gpu else ["tiny"]
    parser.add_argument("--sizes", nargs="+", choices=[*SIZES], default=sizes)
    parser.add_argument("--forms", nargs="+", choices=[*FORMS], default=[*FORMS])
    parser.add_argument("--only", nargs="+", choices=known, default=known, help=f"contenders; {PLAIN} always")
    options = parser.parse_args(arguments)
    device, names = torch.device("cuda" if on_gpu else "cpu"), [x for x in known if x in {PLAIN, *options.only}]
    print(heading(header("benchmarks.step", arguments, device, PACKAGES)))
    for size in options.sizes:
        for form in options.forms:
            config = config_of(size, form, options.batch, "bf16" if on_gpu else "fp32")
            found, left_out = measure(config, names, options.rounds, options.steps)
            print(f"\n{size} as {form}:\n", *table(HEAD, found), sep="\n", flush=True)
            print(*(f"\nLeft out: {line}." for line in left_out), sep="", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
