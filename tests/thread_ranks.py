"""Threads as ranks: torch.distributed between the threads of a process, for tests of what ranks agree on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

CALLS = ("get_rank", "get_world_size", "get_backend", "all_gather", "broadcast", "new_group", "destroy_process_group")


class ThreadRanks:
    """The collectives that llm/parallel/agreement.py uses. A thread is rank 0 unless it says otherwise."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.barrier = threading.Barrier(world, timeout=30)
        self.local = threading.local()
        self.sent: list[Tensor | None] = [None] * world

    def get_rank(self, group: Any = None) -> int:
        return getattr(self.local, "rank", 0)

    def get_world_size(self, group: Any = None) -> int:
        return self.world

    def get_backend(self, group: Any = None) -> str:
        return "gloo"

    def all_gather(self, outputs: list[Tensor], mine: Tensor, group: Any = None) -> None:
        self.sent[self.get_rank()] = mine
        self.barrier.wait()
        for output, sent in zip(outputs, self.sent, strict=True):
            assert sent is not None
            output.copy_(sent)
        self.barrier.wait()

    def new_group(self, **options: Any) -> None:
        """All of them."""

    def destroy_process_group(self, group: Any) -> None:
        pass

    def broadcast(self, tensor: Tensor, group: Any = None, group_src: int = 0) -> None:
        outputs = [tensor.clone() for _ in range(self.world)]
        self.all_gather(outputs, tensor.clone())
        tensor.copy_(outputs[group_src])


@contextmanager
def ranks_in_threads(world: int) -> Iterator[ThreadRanks]:
    """Put threads in the place of processes."""
    ranks = ThreadRanks(world)
    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(dist, name, getattr(ranks, name))
        yield ranks


def on_thread_ranks(world: int, action: Callable[[int], Any]) -> list[Any]:
    """What action(rank) returns, or the exception it raises, for each rank."""
    with ranks_in_threads(world) as ranks:

        def guarded(rank: int) -> Any:
            ranks.local.rank = rank
            try:
                return action(rank)
            except Exception as error:  # noqa: BLE001 - the test looks at it
                return error
            except BaseException:
                ranks.barrier.abort()
                raise

        with ThreadPoolExecutor(world) as pool:
            return list(pool.map(guarded, range(world)))
