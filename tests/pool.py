"""A pool of ranks for distributed tests: starting ranks costs seconds, so cases share them.

`RankPool(2).run(function, *args)` calls `function(*args)` on every rank, inside one gloo process group, and returns
the results by rank. A rank that raises fails the test with its traceback, and the pool starts afresh.
"""

from __future__ import annotations

import datetime
import multiprocessing as mp
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from llm.cluster.preflight import remove_abandoned_locks
from llm.cluster.ranks import Ranks, export, free_port, operator_folder

TIMEOUT_SECONDS = 300  # of two graphs of Inductor on a busy machine


def serve(rank: int, world_size: int, port: int, path: list[str], connection: Any) -> None:
    """A rank's main loop: receive (function, args), send ("ok", result) or ("error", traceback)."""
    sys.path[:] = path
    export(Ranks(rank, rank, world_size, world_size, "127.0.0.1", port, "pool"), os.environ)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=TIMEOUT_SECONDS)
    dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timeout)
    remember_meshes()
    while (task := connection.recv()) is not None:
        function, args = task
        try:
            connection.send(("ok", function(*args)))
        except BaseException:  # noqa: BLE001 - whatever it was, the test must hear of it
            connection.send(("error", traceback.format_exc()))
    dist.destroy_process_group()


def remember_meshes() -> None:
    """Give cases with the same layout the same mesh: each makes three process groups, whose threads never end."""
    from llm.parallel.mesh import Mesh

    create, known = Mesh.create, {}

    def remembered(config: Any, device_type: str) -> Mesh:
        key = config.tensor_parallel, device_type
        if key not in known:
            known[key] = create(config, device_type)
        return known[key]

    Mesh.create = staticmethod(remembered)


class RankPool:
    """`world_size` processes that run functions together; started at first use."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.processes: list[Any] = []
        self.connections: list[Any] = []

    def start(self) -> None:
        # A rank that was killed while DeepSpeed's operator was built leaves a lock that the next would wait for.
        remove_abandoned_locks(Path(os.environ.get("TORCH_EXTENSIONS_DIR", operator_folder())))
        context = mp.get_context("spawn")
        port = free_port()
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=serve,
                args=(rank, self.world_size, port, list(sys.path), theirs),
                daemon=True,
            )
            process.start()
            theirs.close()
            self.processes.append(process)
            self.connections.append(ours)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call `function(*args)` on every rank; results by rank."""
        if not self.processes:
            self.start()
        for connection in self.connections:
            connection.send((function, args))
        results: dict[int, Any] = {}
        while len(results) < self.world_size:
            pending = [c for rank, c in enumerate(self.connections) if rank not in results]
            ready = wait(pending, timeout=TIMEOUT_SECONDS)
            if not ready:
                self.fail(f"ranks {set(range(self.world_size)) - set(results)} gave no answer")
            for connection in ready:
                rank = self.connections.index(connection)
                try:
                    status, value = connection.recv()
                except EOFError:
                    status, value = "error", "the process ended"
                if status == "error":
                    self.fail(f"rank {rank}: {value}")
                results[rank] = value
        return [results[rank] for rank in range(self.world_size)]

    def fail(self, message: str) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.connections = [], []
        raise AssertionError(message)

    def close(self) -> None:
        for connection in self.connections:
            connection.send(None)
        for process in self.processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
        self.processes, self.connections = [], []


def with_default_group(call: Callable[..., Any], default: Any, first: Any, group: Any = None) -> Any:
    """`call` of llm/parallel/agreement.py, in the group `default` where it is given none."""
    return call(first, group or default)
