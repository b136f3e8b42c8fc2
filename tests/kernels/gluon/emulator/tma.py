"""TMA: copies that land in pieces some time after their issue, and stores that read shared memory late."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from .barriers import Barrier, one
from .clocks import Moment
from .machine import Machine, Operation
from .memory import Descriptor
from .shared import Shared
from .values import Value


class Load:
    """A copy into shared memory. It lands in two pieces; the barrier counts the bytes of each, and its waiters know of
    the copy once both have landed.
    """

    def __init__(self, machine: Machine, source: Descriptor, coord: list[int], barrier: Barrier, to: Shared) -> None:
        agent = machine.step()
        machine.serial += 1
        self.machine, self.source, self.coord, self.barrier, self.to = machine, source, coord, barrier, to
        self.token, self.clock, self.phase = ("copy", machine.serial), agent.clock.copy(), barrier.passed
        barrier.use(agent.clock, agent.now)
        self.access = to.write("copy", agent.clock, Moment(self.token, 1))
        start = max(agent.time + machine.costs.latency, machine.copies_end)
        size = source.block_type.nbytes
        machine.copies_end = start + size / machine.costs.bandwidth
        machine.event("copies", "copy", to.name, start, machine.copies_end, source.name)
        half = to.view.shape[-1] // 2
        self.pieces = [slice(0, half), slice(half, None)]
        if machine.schedule.flip():
            self.pieces.reverse()
        for i in (1, 2):
            operation = Operation(machine, self.access.what, self.land)
            operation.time = start + i * size / 2 / machine.costs.bandwidth

    def land(self, operation: Operation) -> None:
        piece = (..., self.pieces.pop())
        self.to.view[piece] = self.source.read(self.coord)[piece]
        self.to.written[piece] = True
        if self.barrier.passed != self.phase:
            self.machine.report("bytes", f"{self.access.what} lands after its phase of {self.barrier.name} is over")
        clock = self.clock.copy()
        if not self.pieces:
            clock[self.token] = self.barrier.uses[self.token] = 1
        self.barrier.add(0, -(self.source.block_type.nbytes // 2), clock, operation.time)


class Store:
    """A copy out of shared memory: it reads at some moment before a store_wait that covers it returns."""

    def __init__(self, machine: Machine, to: Descriptor, coord: list[int], source: Shared) -> None:
        agent = machine.step()
        self.access = source.read("copy out", agent.clock, None)
        self.to, self.coord, self.source = to, coord, source
        self.operation = Operation(machine, self.access.what, self.read)
        self.operation.time = agent.time + to.block_type.nbytes / machine.costs.bandwidth
        agent.stores.append(self)

    def read(self, operation: Operation) -> None:
        self.to.write(self.coord, self.source.numbers(self.access.what))

    def finish(self) -> None:
        """The partition has waited: it knows that shared memory is read."""
        self.operation.happen()
        self.access.end = self.operation.machine.current.now


def module(machine: Machine) -> SimpleNamespace:
    """What stands for triton.experimental.gluon.language.nvidia.hopper.tma."""

    def checked(descriptor: Any, coord: Sequence[Any], memory: Any) -> list[int]:
        if not isinstance(descriptor, Descriptor) or not isinstance(memory, Shared):
            raise TypeError("expected a descriptor and shared memory")
        if memory.shape != descriptor.block_shape or memory.dtype != descriptor.dtype:
            raise TypeError(f"{memory.dtype}{memory.shape} for a block {descriptor.dtype}{descriptor.block_shape}")
        if not memory.view.flags.c_contiguous:
            raise TypeError(f"{memory.name} is not in one piece")
        return descriptor.coordinates(coord)

    def async_copy_global_to_shared(
        tensor_desc: Descriptor, coord: Sequence[Any], barrier: Any, result: Shared, pred: Any = True
    ) -> None:
        if pred:
            Load(machine, tensor_desc, checked(tensor_desc, coord, result), one(barrier), result)

    def async_copy_shared_to_global(tensor_desc: Descriptor, coord: Sequence[Any], src: Shared) -> None:
        Store(machine, tensor_desc, checked(tensor_desc, coord, src), src)

    def store_wait(pendings: int) -> None:
        if isinstance(pendings, Value):
            raise TypeError("store_wait takes a constant")
        agent = machine.step()
        while len(agent.stores) > pendings:
            agent.stores.pop(0).finish()

    return SimpleNamespace(
        async_copy_global_to_shared=async_copy_global_to_shared,
        async_copy_shared_to_global=async_copy_shared_to_global,
        store_wait=store_wait,
    )
