"""Shared memory: NaN until written, every access checked for races, order and bytes that nobody wrote."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from .barriers import Barriers
from .clocks import Access, Clock, Log, Moment
from .machine import Machine
from .values import Value, array_type

NAMED = re.compile(r"\s*(\w+)\s*=")


class Shared:
    """A view of an allocation in shared memory, a `shared_memory_descriptor` of Gluon."""

    def __init__(self, root: Root, view: np.ndarray, written: np.ndarray, name: str) -> None:
        self.root, self.view, self.written, self.name = root, view, written, name

    @property
    def dtype(self) -> Any:
        return self.root.dtype

    @property
    def layout(self) -> Any:
        return self.root.layout

    @property
    def shape(self) -> list[int]:
        return list(self.view.shape)

    rank = property(lambda self: self.view.ndim)

    def _part(self, name: str, change: Any) -> Shared:
        view, written = change(self.view), change(self.written)
        if not np.may_share_memory(view, self.view):
            raise ValueError(f"{self.name}: a view with other strides cannot be reshaped")
        return Shared(self.root, view, written, name)

    def index(self, index: Any) -> Shared:
        i = index.data if isinstance(index, Value) else index
        if not 0 <= i < len(self.view):
            self.root.machine.report("bounds", f"{self.name}.index({i}) of {len(self.view)}")
        i %= len(self.view)
        return self._part(f"{self.name}[{i}]", lambda x: x[i])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        if isinstance(start, Value) or isinstance(length, Value):
            raise TypeError("start and length of a slice must be constants")
        if not 0 <= start <= start + length <= self.view.shape[dim]:
            self.root.machine.report("bounds", f"{self.name}.slice({start}, {length}, {dim}) of {self.shape}")
        part = (*[slice(None)] * dim, slice(start, start + length))
        return self._part(f"{self.name}[{start}:{start + length}]", lambda x: x[part])

    def permute(self, order: Sequence[int]) -> Shared:
        return self._part(self.name, lambda x: x.transpose(order))

    def reshape(self, shape: Sequence[int]) -> Shared:
        if math.prod(shape) != self.view.size:
            raise ValueError(f"{self.shape} cannot be reshaped to {list(shape)}")
        return self._part(self.name, lambda x: x.reshape(shape))

    def load(self, layout: Any) -> Value:
        agent = self.root.machine.step()
        self.read("load", agent.clock, agent.now, generic=True)
        self.root.machine.work(self.view.size)
        return Value(self.view.copy(), self.dtype, self.root.machine)

    def store(self, value: Value) -> None:
        if value.shape != self.shape or value.dtype != self.dtype:
            raise TypeError(f"{value} stored into {self.name}, which is {self.dtype}{self.shape}")
        agent = self.root.machine.step()
        self.write("store", agent.clock, agent.now, generic=True)
        self.root.machine.work(self.view.size)
        self.view[...] = value.data
        self.written[...] = True

    def _access(self, what: str, clock: Clock, end: Moment | None, write: bool, generic: bool) -> Access:
        machine = self.root.machine
        access = Access(self.view, machine.said(f"{what} of {self.name}"), machine.current.name, write, generic, end)
        self.root.log.add(access, clock, generic, machine.report)
        return access

    def read(self, what: str, clock: Clock, end: Moment | None, generic: bool = False) -> Access:
        """Note that a read begins; end: None while it is asynchronous and not waited for."""
        return self._access(what, clock, end, False, generic)

    def write(self, what: str, clock: Clock, end: Moment | None, generic: bool = False) -> Access:
        return self._access(what, clock, end, True, generic)

    def numbers(self, what: str) -> np.ndarray:
        """What stands there now; a finding if some of it was never written."""
        if not self.written.all():
            self.root.machine.report("uninitialised", f"{what} of {self.name}, which nothing has written")
        return self.view


class Root:
    """An allocation."""

    def __init__(self, machine: Machine, dtype: Any, layout: Any) -> None:
        self.machine, self.dtype, self.layout, self.log = machine, dtype, layout, Log()
        machine.logs.append(self.log)


def allocate(machine: Machine, dtype: Any, shape: Sequence[int], layout: Any, value: Value | None) -> Any:
    """Barriers, if the layout is theirs, or memory that is NaN (integers: -1) until written."""
    found = NAMED.match(machine.where()[1])
    name = found[1] if found else "shared"
    if any(isinstance(side, Value) for side in shape):
        raise TypeError("the shape of shared memory must be constant")
    if layout == "mbarrier":
        return Barriers(machine, name, shape)
    kind = array_type(dtype)
    empty = np.full(shape, np.nan if kind is np.float32 else -1, kind)
    memory = Shared(Root(machine, dtype, layout), empty, np.zeros(shape, np.bool_), name)
    if value is not None:
        memory.store(value)
    return memory


def fence(machine: Machine) -> None:
    """fence_async_shared: the stores that the partition knows of are seen by copies and products from now on."""
    agent = machine.step()
    for log in machine.logs:
        for access in log.accesses:
            if access.known_to(agent.clock):
                access.unfenced = False
