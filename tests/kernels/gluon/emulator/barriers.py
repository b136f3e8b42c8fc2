"""mbarriers: phases, arrivals, bytes, and what their waiters learn."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from .clocks import Clock, Moment
from .machine import Machine
from .values import Value


class Barrier:
    """One mbarrier. A phase is over once `count` parties have arrived and as many bytes have landed as were expected.

    A wait names a phase by its parity alone, so it must come before the next phase is over. The clock of whoever waited
    holds how many phases of the barrier it knows to be over.
    """

    def __init__(self, machine: Machine, name: str) -> None:
        self.machine, self.name = machine, name
        self.count: int | None = None
        self.ready: Moment | None = None
        """When init was over."""
        self.uses: dict[Any, int] = {}
        """The last use by each party."""
        self.waiting: dict[str, int] = {}
        """Partitions that wait, and the phase that each waits for."""
        self.passed = self.missing = self.bytes = 0
        """Phases over; arrivals and bytes that the current one lacks."""
        self.learned, self.known = Clock(), Clock()
        """What the arrivals of the current phase know; what those of all phases before knew."""
        self.time = self.over_at = 0.0
        """By assumed costs: of the last arrival or copy, and when the last phase was over."""
        self.generation = 0

    @property
    def key(self) -> tuple[Barrier, int]:
        """Its entry in clocks, another one after each init."""
        return self, self.generation

    def __str__(self) -> str:
        state = f"{self.missing} of {self.count} arrivals and {self.bytes} bytes missing"
        return f"{self.name} (in phase {self.passed}, {state})"

    def init(self, count: Any) -> None:
        agent = self.machine.step()
        if self.count is not None:
            self.machine.report("barrier", f"{self.name} is initialised twice")
        if isinstance(count, Value) or not 0 < count < 2**20:
            raise TypeError(f"the count of {self.name} must be a positive constant, found {count}")
        self.count, self.ready, self.missing, self.passed, self.bytes = count, agent.now, count, 0, 0
        self.generation, self.uses = self.generation + 1, {}

    def invalidate(self) -> None:
        agent = self.machine.step()
        self.use(agent.clock, agent.now)
        for party, time in self.uses.items():
            if agent.clock[party] < time:
                self.machine.report("barrier", f"invalidate of {self.name} is not ordered after its use by {party}")
        self.count = None

    def use(self, clock: Clock, now: Moment) -> None:
        """Note that a party uses it, and report a use that init is not known to precede."""
        if self.count is None:
            self.machine.report("barrier", f"{self.name} is used without init")
            self.count = self.missing = 1
        elif clock[self.ready.party] < self.ready.time:
            self.machine.report("barrier", f"{now.party} uses {self.name} without being ordered after its init")
        self.uses[now.party] = now.time

    def add(self, arrivals: int, size: int, clock: Clock, time: float) -> None:
        """Count arrivals; `size`: bytes expected, or if negative landed."""
        self.missing, self.bytes = self.missing - arrivals, self.bytes + size
        self.learned.join(clock)
        self.time = max(self.time, time)
        if self.missing < 0:
            self.machine.report("arrivals", f"{self.name} gets more arrivals in a phase than its count of {self.count}")
            self.missing = 0
        if self.missing == 0 and self.bytes == 0 and self.count is not None:
            self.passed, self.missing = self.passed + 1, self.count
            self.over_at = self.time
            self.known.join(self.learned)
            self.known[self.key] = self.passed
            for waiter, phase in self.waiting.items():
                self.check_lapped(waiter, phase)

    def check_lapped(self, waiter: str, phase: int) -> None:
        if self.passed > phase + 1:
            text = f"phase {self.passed - 1} of {self.name} is over before {waiter}'s wait for phase {phase} returns"
            self.machine.report("lapped", text)

    def arrive(self, count: int) -> None:
        agent = self.machine.step()
        self.use(agent.clock, agent.now)
        self.add(count, 0, agent.clock, agent.time)

    def expect(self, size: int) -> None:
        agent = self.machine.step()
        self.use(agent.clock, agent.now)
        self.add(1, size, agent.clock, agent.time)

    def wait(self, parity: Any) -> None:
        machine = self.machine
        parity = int(parity.data) if isinstance(parity, Value) else int(parity)
        if parity not in (0, 1):
            machine.report("parity", f"{self.name} is waited for with parity {parity}")
        agent = machine.current
        began, line = agent.time, machine.where()[0]
        self.use(agent.clock, agent.now)
        seen = agent.clock[self.key]
        wanted = seen - 1 if (seen - 1) % 2 == parity % 2 else seen
        self.check_lapped(agent.name, wanted)
        self.waiting[agent.name] = wanted
        machine.step(lambda: self.passed % 2 != parity % 2, lambda: f"parity {parity} of {self} at {line}")
        del self.waiting[agent.name]
        agent.clock.join(self.known)
        self.uses[agent.name] = agent.now.time
        if self.over_at > agent.time:
            agent.wait_until(self.over_at)
            machine.event(agent.name, "wait", self.name, began, agent.time)

    def check_end(self) -> None:
        """At the end of the kernel no byte may be on its way, or be expected."""
        if self.bytes:
            self.machine.report("bytes", f"the kernel ends while {self.name} lacks {self.bytes} bytes")


class Barriers:
    """Barriers in shared memory: [n, 1] or a single one [1]."""

    def __init__(self, machine: Machine, name: str, shape: Sequence[int]) -> None:
        if shape[-1] != 1 or len(shape) > 2:
            raise TypeError(f"expected barriers of shape [n, 1] or [1], found {list(shape)}")
        self.machine, self.name, self.shape = machine, name, list(shape)
        names = [f"{name}[{i}]" for i in range(shape[0])] if len(shape) == 2 else [name]
        self.items = [Barrier(machine, each) for each in names]
        machine.barriers += self.items

    def index(self, index: Any) -> Barrier:
        i = index.data if isinstance(index, Value) else index
        if not 0 <= i < len(self.items):
            self.machine.report("bounds", f"{self.name}.index({i}) of {len(self.items)}")
        return self.items[i % len(self.items)]


def one(barrier: Any) -> Barrier:
    """The barrier itself: an allocation of a single one needs no index."""
    if isinstance(barrier, Barriers) and len(barrier.items) == 1:
        return barrier.items[0]
    if not isinstance(barrier, Barrier):
        raise TypeError(f"expected a barrier, found {type(barrier).__name__}")
    return barrier


def module(machine: Machine) -> SimpleNamespace:
    """What stands for triton.experimental.gluon.language.nvidia.hopper.mbarrier."""

    def init(mbarrier: Any, count: int) -> None:
        one(mbarrier).init(count)

    def invalidate(mbarrier: Any) -> None:
        one(mbarrier).invalidate()

    def expect(mbarrier: Any, size: int, /, pred: Any = True) -> None:
        if isinstance(size, Value):
            raise TypeError("the bytes to expect must be a constant")
        if pred:
            one(mbarrier).expect(size)

    def arrive(mbarrier: Any, *, count: int = 1, pred: Any = True) -> None:
        if isinstance(count, Value) or count < 1:
            raise TypeError(f"the count of an arrival must be a positive constant, found {count}")
        if pred:
            one(mbarrier).arrive(count)

    def wait(mbarrier: Any, phase: Any, pred: Any = True, deps: Sequence[Any] = ()) -> None:
        if pred:
            one(mbarrier).wait(phase)

    def layout() -> str:
        return "mbarrier"

    return SimpleNamespace(
        init=init, invalidate=invalidate, expect=expect, arrive=arrive, wait=wait, MBarrierLayout=layout
    )
