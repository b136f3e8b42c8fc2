"""The machine that runs a kernel: partitions take turns, and asynchronous operations happen in between.

Every partition is a thread, but only one runs at a time. Before each access to memory or barriers it asks the schedule
who goes on: this partition, another one that is not waiting, or a copy or a product that is in flight.
"""

from __future__ import annotations

import re
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .clocks import Clock, Log, Moment
from .report import Event, Finding, Report
from .trace import Costs

SOURCE = re.compile(r"<emulated (.+)>")  # the file name under which kernels are compiled (load.py)


class Stopped(BaseException):
    """Unwinds the partitions' threads once the run is over."""


class Agent:
    """A partition, or the kernel's own beginning and end ("main")."""

    def __init__(self, machine: Machine, name: str, body: Callable[[], Any], clock: Clock, time: float) -> None:
        self.machine, self.name, self.body, self.clock, self.time = machine, name, body, clock, time
        self.weight = machine.schedule.agent_weight()
        self.ready: Callable[[], bool] | None = None
        self.waits_for: Callable[[], str] = str
        self.finished = self.exponentials = False
        self.since = time
        self.result: Any = None
        self.products: list[Any] = []
        self.stores: list[Any] = []
        """Products and copies to global memory that no wait has covered, oldest first."""
        clock[name] = 1
        self.turn = threading.Semaphore(0)
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    @property
    def now(self) -> Moment:
        return Moment(self.name, self.clock[self.name])

    def wait_until(self, time: float) -> None:
        """By assumed costs, what it waits for comes at `time`."""
        self.time = self.since = max(self.time, time)

    def can_go(self) -> bool:
        return not self.finished and (self.ready is None or self.ready())

    def _run(self) -> None:
        self.turn.acquire()
        machine = self.machine
        if not machine.over:
            machine.current = self
            try:
                with np.errstate(all="ignore"):  # NaN and overflow of floats are the kernel's business
                    self.result = self.body()
                for product in self.products:
                    machine.report("unfinished", f"{self.name} returns before any wait covers {product.what}")
            except Stopped:
                pass
            except Exception as error:  # noqa: BLE001 - whatever Python raises in a kernel is a finding
                machine.fail(error)
        self.finished = True
        machine.hand_over()


class Operation:
    """Something asynchronous: it takes effect once, when the schedule or a wait that covers it says so."""

    def __init__(
        self, machine: Machine, what: str, effect: Callable[[Operation], None], after: Operation | None = None
    ) -> None:
        self.machine, self.what, self.effect, self.after = machine, what, effect, after
        self.done = False
        self.agent, self.place = machine.current, machine.where()
        self.weight = machine.schedule.operation_weight()
        self.time = 0.0
        """When it ends, in clocks by assumed costs."""
        machine.operations.append(self)

    def can_go(self) -> bool:
        return self.after is None or self.after.done

    def happen(self) -> None:
        if not self.done:
            if self.after is not None:
                self.after.happen()
            self.done, self.after = True, None
            machine = self.machine
            machine.operations.remove(self)
            before, machine.current, machine.place = machine.current, self.agent, self.place
            self.effect(self)
            machine.current, machine.place = before, None


class Machine:
    """Runs the CTAs of a launch one after the other, and collects what it finds."""

    def __init__(self, grid: Sequence[int], schedule: Any, lines: dict[str, list[str]], costs: Costs) -> None:
        self.grid, self.schedule, self.lines, self.costs = (*grid, 1, 1)[:3], schedule, lines, costs
        self.found: dict[Finding, None] = {}
        self.events: list[Event] = []
        self.steps = 0
        self.begin((0, 0, 0), -1)

    def begin(self, program: tuple[int, int, int], number: int) -> None:
        """Clear what belongs to one CTA, the `number`-th of the launch."""
        self.program, self.cta = program, number
        self.agents: list[Agent] = []
        self.operations: list[Operation] = []
        self.logs: list[Log] = []
        self.barriers: list[Any] = []
        self.current: Agent = None
        self.place: tuple[str, str] | None = None
        """The line of the operation that takes effect, if one does."""
        self.over = self.broken = False
        self.serial = 0
        self.copies_end = self.products_end = 0.0
        """When the copy engine and the tensor cores are free, in clocks by assumed costs."""
        self.ended = threading.Semaphore(0)

    def run(self, body: Callable[[], Any], program: tuple[int, int, int]) -> bool:
        """Run one CTA; whether it came to its end."""
        self.begin(program, self.cta + 1)
        main = Agent(self, "main", body, Clock(), 0.0)
        self.agents.append(main)
        self.hand_over()
        self.ended.acquire()
        for agent in self.agents:
            agent.turn.release()
            agent.thread.join()
        if not self.broken:
            for barrier in self.barriers:
                barrier.check_end()
        return not self.broken

    def next_agent(self) -> Agent | None:
        """Let operations happen until a partition is chosen; None if nothing can go on."""
        while not self.over:
            moves = [move for move in (*self.agents, *self.operations) if move.can_go()]
            if not moves or self.agents[0].finished:
                break
            self.steps += 1
            chosen = self.schedule.choose(moves)
            if isinstance(chosen, Agent):
                return chosen
            chosen.happen()
        return None

    def hand_over(self) -> None:
        """Wake the next partition, or end the CTA."""
        chosen = self.next_agent()
        if chosen is not None:
            chosen.turn.release()
        elif not self.over:
            self.end()

    def end(self) -> None:
        if self.agents[0].finished:
            for operation in self.operations:
                self.report("unfinished", f"the kernel ends while {operation.what} is in flight")
        else:
            stuck = [agent for agent in self.agents if not agent.finished and agent.waits_for()]
            self.report("deadlock", "; ".join(f"{agent.name} waits for {agent.waits_for()}" for agent in stuck))
            self.broken = True
        self.over = True
        self.ended.release()

    def step(self, ready: Callable[[], bool] | None = None, waits_for: Callable[[], str] = str) -> Agent:
        """Called by a partition before each operation; returns once it is chosen, and `ready()` holds."""
        me = self.current
        me.ready, me.waits_for = ready, waits_for
        self.worked(me)
        chosen = self.next_agent()
        if chosen is not me:
            if chosen is not None:
                chosen.turn.release()
            elif not self.over:
                self.end()
            me.turn.acquire()
        if self.over:
            raise Stopped
        self.current, me.ready = me, None
        me.clock[me.name] += 1
        me.time += self.costs.step
        me.since = me.time
        return me

    def worked(self, agent: Agent) -> None:
        """Note what a partition has done in registers since its last access to memory."""
        if agent.time > agent.since:
            kind = "exponentials" if agent.exponentials else "arithmetic"
            self.event(agent.name, kind, "", agent.since, agent.time)
        agent.exponentials = False

    def work(self, elements: int, clocks: float = 0) -> None:
        """Account for an operation on so many elements; clocks: of each element, beyond those of any operation."""
        if self.current is not None:
            self.current.time += elements * (clocks + 1 / self.costs.lanes)
            self.current.exponentials |= clocks > 0

    def report(self, kind: str, text: str) -> None:
        """Record a finding of the kernel's current line."""
        self.found[Finding(kind, text, *self.where())] = None

    def fail(self, error: Exception) -> None:
        """A Python error in the kernel ends the run."""
        frames = [(SOURCE.match(each.filename), each.lineno or 1) for each in traceback.extract_tb(error.__traceback__)]
        places = [(found[1], number) for found, number in frames if found]
        name, number = places[-1] if places else ("?", 1)
        source = self.lines.get(name, [""])[number - 1].strip()
        text = f"{type(error).__name__}: {error}"
        self.found[Finding("error", text, f"{name}:{number}", source)] = None
        self.over = self.broken = True
        self.ended.release()

    def where(self) -> tuple[str, str]:
        """The kernel's current line: "module:number" and its text."""
        if self.place is not None:
            return self.place
        frame = sys._getframe(1)
        while frame is not None:
            if found := SOURCE.match(frame.f_code.co_filename):
                lines = self.lines[found[1]]
                return f"{found[1]}:{frame.f_lineno}", lines[frame.f_lineno - 1].strip()
            frame = frame.f_back
        return "?", ""

    def event(self, lane: str, kind: str, label: str, start: float, end: float, of: str = "") -> None:
        self.events.append(Event(self.cta, lane, kind, label, start, end, self.where()[0], of))

    def said(self, what: str) -> str:
        """A description of an access by the current partition."""
        return f"{what} (line {self.where()[0].rpartition(':')[2]}, {self.current.name})"

    def report_of(self) -> Report:
        return Report(list(self.found), self.steps, self.events)
