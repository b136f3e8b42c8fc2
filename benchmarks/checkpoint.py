"""Saves and loads a training state beside PyTorch's distributed checkpoints, DeepSpeed and safetensors, in turns.

usage: python -m benchmarks.checkpoint [ROUNDS] [MEGABYTES]     two ranks, gloo, on the CPU; results: docs/benchmarks.md

Each rank holds its half of a state of MEGABYTES: fp32 weights and two moments, in tensors of 9 MB. After each save the
ranks take steps, matrix products and an all-reduce, until it is durable. The first round warms up and is not counted.
"""

import hashlib
import json
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.clock import alternate
from benchmarks.report import NONE, header, heading, table
from llm.checkpoint.background import Saver
from llm.checkpoint.manifest import KINDS, Piece
from llm.checkpoint.reader import open_agreed
from llm.slices import Slice

RANKS, ELEMENTS = 2, 9 * 2**18
OURS, BESIDE = "Ingot", "Ingot, asynchronous"
DCP, DCP_ASYNC = "torch DCP, save", "torch DCP, async_save"
SAFE, DEEPSPEED = "safetensors, save_file and fsync", "DeepSpeed, save_checkpoint (no fsync)"
LOAD, TORCH_LOAD = "Ingot, verified", "torch.load(mmap=False) and SHA-256 of the same bytes"
FSYNCED = (DCP, DCP_ASYNC, SAFE)
State = dict[str, Tensor]


class Save:
    """Starts a save, which returns once the state may change, and says whether it is durable on this rank."""

    def __init__(self, folder: Path, state: State) -> None:
        self.folder, self.state = folder, state

    def begin(self) -> None: ...

    def done(self) -> bool:
        return True

    def end(self) -> None:
        """Raises what the save did."""

    def held(self) -> int:
        """Bytes that are kept for the next save."""
        return 0


class Ingot(Save):
    asynchronous = False

    def __init__(self, folder: Path, state: State) -> None:
        super().__init__(folder, state)
        options = {"keep_last": 9, "keep_every": None, "say": lambda text: None}
        self.saver = Saver(folder, asynchronous=self.asynchronous, **options)

    def begin(self) -> None:
        self.saver.save(1, pieces(self.state), {})

    def done(self) -> bool:
        return self.saver.pending is None or self.saver.pending.done()

    def end(self) -> None:
        self.saver.wait()

    def held(self) -> int:
        return sum(buffer.nbytes for buffer in self.saver.buffers)


class IngotBeside(Ingot):
    asynchronous = True


class Distributed(Save):
    def begin(self) -> None:
        dcp.save(self.state, checkpoint_id=self.folder)


class DistributedAsync(Save):
    def __init__(self, folder: Path, state: State) -> None:
        super().__init__(folder, state)
        self.group: Any = dist.new_group(backend="gloo")  # as its documentation advises: the steps use the other one

    def begin(self) -> None:
        self.future: Any = dcp.async_save(self.state, checkpoint_id=self.folder, process_group=self.group)

    def done(self) -> bool:
        return self.future.done()

    def end(self) -> None:
        self.future.result()


class Safetensors(Save):
    def begin(self) -> None:
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"{dist.get_rank()}.safetensors"
        save_file(self.state, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        dist.barrier()


class DeepSpeed(Save):
    """ZeRO 1 over weights of as many elements: it also writes the weights of the forward pass, a third more."""

    def __init__(self, folder: Path, state: State) -> None:
        import deepspeed

        super().__init__(folder, state)
        count = RANKS * len(state) // len(KINDS)
        model = nn.ParameterDict({f"p{i}": nn.Parameter(torch.zeros(ELEMENTS)) for i in range(count)})
        optimizer = torch.optim.AdamW(model.parameters())
        config = {"train_batch_size": RANKS, "zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
        self.engine: Any = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]  # pyright: ignore

    def begin(self) -> None:
        self.engine.save_checkpoint(str(self.folder))
        dist.barrier()


SYSTEMS: dict[str, type[Save]] = {
    OURS: Ingot, BESIDE: IngotBeside, DCP: Distributed, DCP_ASYNC: DistributedAsync, SAFE: Safetensors,
    DEEPSPEED: DeepSpeed,
}  # fmt: skip


def pieces(state: State) -> list[Piece]:
    full = Slice.full((ELEMENTS,))
    return [Piece(key.split("/")[0], key.split("/")[1], full, 0, tensor) for key, tensor in state.items()]


def anonymous_bytes() -> int:
    """Memory of this process, without what the page cache holds."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return 1024 * sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem"))


class Peak:
    """The most memory that this process takes while the block runs, beyond `base`."""

    def __init__(self, base: int) -> None:
        self.base, self.bytes, self.over = base, 0, threading.Event()
        self.thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self.over.wait(0.02):
            self.bytes = max(self.bytes, anonymous_bytes() - self.base)

    def __enter__(self) -> "Peak":
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()


def step(work: Tensor, flag: bool) -> tuple[float, bool]:
    """Seconds of a step, and whether all ranks gave a true flag."""
    start = time.perf_counter()
    for _ in range(4):
        torch.mm(work, work)
    gradient = torch.full((2**18,), float(flag))
    dist.all_reduce(gradient)
    return time.perf_counter() - start, float(gradient[0]) == RANKS


def timed_save(system: Save, work: Tensor) -> dict[str, Any]:
    """Seconds of the pause and until all is durable, of each step meanwhile, and bytes beyond the state's."""
    if dist.get_rank() == 0:
        os.sync()
    dist.barrier()
    steps, durable = [], False
    with Peak(anonymous_bytes() - system.held()) as peak:
        start = time.perf_counter()
        system.begin()
        pause = total = time.perf_counter() - start
        while isinstance(system, IngotBeside | DistributedAsync) and not durable:
            total = time.perf_counter() - start
            seconds, durable = step(work, system.done())
            steps += [] if durable else [seconds]
    system.end()
    return {"pause": pause, "total": total, "steps": steps, "peak": peak.bytes}


def timed_loads(folder: Path, state: State) -> dict[str, float]:
    """Seconds until this rank has its part, every byte verified; both from the page cache."""
    path, found = folder / f"{dist.get_rank()}.pt", {}

    def ours() -> None:
        reader, _ = open_agreed(folder / "ours")
        assert reader is not None
        for piece in pieces(state):
            found[piece.name] = reader.read_range(piece.name, piece.kind, piece.slice, 0, ELEMENTS)

    def plain() -> None:
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256")  # pyright: ignore[reportAttributeAccessIssue]
        found.update(torch.load(path, mmap=False))
        dist.barrier()

    seconds: dict[str, float] = {}
    actions: list[tuple[str, Callable[[], None]]] = [(LOAD, ours), (TORCH_LOAD, plain)]
    for name, load in actions:
        dist.barrier()
        start = time.perf_counter()
        load()
        seconds[name] = time.perf_counter() - start
        found.clear()
    return seconds


def rank_main(rank: int, folder: Path, port: int, rounds: int, count: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    state = {f"rank{rank}.{i}/{kind}": torch.randn(ELEMENTS) for i in range(count) for kind in KINDS}
    work, results = torch.randn(1024, 1024), []
    systems = {name: kind(folder / kind.__name__, state) for name, kind in SYSTEMS.items()}
    for turn, name in enumerate(alternate(list(systems), rounds)):
        results.append({"name": name, "round": turn // len(systems)} | timed_save(systems[name], work))
        dist.barrier()
        if rank == 0:
            shutil.rmtree(systems[name].folder)
    for number in range(rounds):
        results.append({"name": "alone", "round": number, "steps": [step(work, False)[0] for _ in range(10)]})
    saver = Saver(folder / "ours", asynchronous=False, keep_last=9, keep_every=None, say=lambda text: None)
    saver.save(1, pieces(state), {})
    torch.save(state, folder / f"{rank}.pt")
    for number in range(rounds):
        loads = timed_loads(folder, state).items()
        results += [{"name": name, "round": number, "total": seconds} for name, seconds in loads]
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def main(rounds: int = 5, megabytes: int = 1300) -> None:
    count = round(megabytes * 1e6 / RANKS / len(KINDS) / ELEMENTS / 4)
    part = count * len(KINDS) * ELEMENTS * 4
    head = header("benchmarks.checkpoint", sys.argv[1:], torch.device("cpu"), ["torch", "deepspeed", "safetensors"])
    Path("runs").mkdir(exist_ok=True)
    with socket.socket() as free, tempfile.TemporaryDirectory(dir="runs", prefix="bench-checkpoint-") as name:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        mp.spawn(rank_main, (Path(name).resolve(), port, rounds, count), nprocs=RANKS)  # pyright: ignore
        records = [json.loads((Path(name) / f"{rank}.json").read_text()) for rank in range(RANKS)]
    print(heading(head), end="\n\n")
    report(records, part)


def report(records: list[list[dict[str, Any]]], part: int) -> None:
    """Medians over the rounds, of the slower rank; of steps the mean. part: bytes of a rank's state."""

    def of(name: str, key: str) -> list[Any]:
        rows = [pair for pair in zip(*records, strict=True) if pair[0]["name"] == name and pair[0]["round"] > 0]
        return [max((each[key] for each in pair), key=lambda x: x if key != "steps" else sum(x)) for pair in rows]

    alone = median(seconds for steps in of("alone", "steps") for seconds in steps)
    during = {name: [s for steps in of(name, "steps") for s in steps] for name in SYSTEMS}
    figures = {name: [median(of(name, key)) for key in ("pause", "total", "peak")] for name in SYSTEMS}
    rows = []
    for name, (pause, total, peak) in figures.items():
        steps = f"{mean(during[name]) * 1e3:.0f} ({mean(during[name]) / alone:.2f})" if during[name] else NONE
        rows.append([name, f"{pause * 1e3:.0f}", steps, f"{total:.2f}", f"{peak / part:.2f}"])
    print(f"{part * RANKS / 1e6:.0f} MB in all; a step alone takes {alone * 1e3:.0f} ms.\n")
    columns = ["", "pause, ms", "step meanwhile, ms (of one alone)", "until durable, s", "memory, of a rank's part"]
    print(*table(columns, rows), sep="\n", end="\n\n")
    loads = {name: median(of(name, "total")) for name in (LOAD, TORCH_LOAD)}
    print(*table(["load", "s"], [[name, f"{seconds:.2f}"] for name, seconds in loads.items()]), sep="\n", end="\n\n")
    fastest = min(figures[name][1] for name in FSYNCED)
    goals = [
        ("pause, of DCP's asynchronous one", figures[BESIDE][0] / figures[DCP_ASYNC][0], 0.5),
        ("a step during an asynchronous save, of one alone", mean(during[BESIDE] or [alone]) / alone, 1.3),
        ("until durable, of the fastest other that fsyncs", figures[OURS][1] / fastest, 1.0),
        ("memory of an asynchronous save, of a rank's part", figures[BESIDE][2] / part, 1.0),
        ("verified load, of torch.load and SHA-256", loads[LOAD] / loads[TORCH_LOAD], 1.1),
    ]
    print(*table(["ratio", "measured", "goal, at most"], [[n, f"{x:.2f}", str(g)] for n, x, g in goals]), sep="\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
