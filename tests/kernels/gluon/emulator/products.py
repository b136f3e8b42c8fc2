"""Asynchronous products of a warpgroup (wgmma): they take effect at any moment up to the wait that covers them."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from triton.experimental.gluon import language as gl

from .machine import Machine, Operation
from .shared import Shared
from .values import Value


class Accumulator:
    """What Gluon calls warpgroup_mma_accumulator: it has no arithmetic, only products and waits take it."""

    def __init__(self, shape: list[int], product: Product | None, value: Value | None) -> None:
        self.shape, self.product, self.value = shape, product, value
        self.used = False
        """Whether a product in flight adds to these registers."""

    dtype = gl.float32


class Product:
    """a b + acc in flight. Products of a partition take effect in their order."""

    def __init__(self, machine: Machine, a: Any, b: Shared, acc: Any, use_acc: bool) -> None:
        agent = machine.step()
        self.a, self.b, self.acc, self.use_acc = a, b, acc, use_acc
        self.result: np.ndarray | None = None
        self.what = machine.said("product")
        self.reads = [x.read("product", agent.clock, None) for x in (a, b) if isinstance(x, Shared)]
        before = agent.products[-1].operation if agent.products else None
        self.operation = Operation(machine, self.what, self.compute, before)
        start = max(agent.time, machine.products_end)
        clocks = 2 * a.shape[0] * a.shape[1] * b.shape[1] / machine.costs.flop
        self.operation.time = machine.products_end = start + clocks
        left = a.name if isinstance(a, Shared) else "registers"
        machine.event(f"{agent.name} products", "product", b.name, start, start + clocks, left)
        agent.products.append(self)

    def compute(self, operation: Operation) -> None:
        a, b = (x.numbers(self.what) if isinstance(x, Shared) else x.data for x in (self.a, self.b))
        self.result = np.matmul(a, b)
        if self.use_acc:
            before = self.acc.product.result if getattr(self.acc, "product", None) else self.acc.value.data
            self.result += before
        self.acc = None

    def finish(self) -> None:
        """The partition has waited for it."""
        self.operation.happen()
        machine = self.operation.machine
        for access in self.reads:
            access.end = machine.current.now
        machine.current.wait_until(self.operation.time)


def checked(a: Any, b: Any, acc: Any) -> None:
    """Raise TypeError for operands that wgmma does not take."""
    if not isinstance(b, Shared) or not isinstance(a, (Shared, Value)) or not isinstance(acc, (Accumulator, Value)):
        raise TypeError("expected a in registers or shared memory, b in shared memory, acc in registers")
    (rows, inner), (second, columns) = a.shape, b.shape
    if inner != second or acc.shape != [rows, columns]:
        raise TypeError(f"a product of {a.shape} and {b.shape} added to {acc.shape}")
    if a.dtype != b.dtype or a.dtype.primitive_bitwidth != 16 or acc.dtype != gl.float32:
        raise TypeError(f"a product of {a.dtype} and {b.dtype} added to {acc.dtype}")
    if rows % 64 or columns % 8 or inner % 16:
        raise TypeError(f"no instruction for a product of {a.shape} and {b.shape}")


def retire(machine: Machine, outstanding: int, deps: Sequence[Any]) -> list[Value]:
    """Wait until at most so many products are in flight; the values of `deps`."""
    agent = machine.step()
    began = agent.time
    while len(agent.products) > outstanding:
        product = agent.products.pop(0)
        product.finish()
        if isinstance(product.a, Value) and not any(dep is product.a for dep in deps):
            text = f"{product.what} reads registers that are not among the deps of the wait that covers it"
            machine.report("lifetime", text)
    if agent.time > began:
        machine.event(agent.name, "wait", "products", began, agent.time)
    return [settled(machine, dep, outstanding) for dep in deps]


def settled(machine: Machine, dep: Any, outstanding: int) -> Value:
    """The value of a dependency of a wait: NaN while its product is in flight."""
    if isinstance(dep, Value):
        return dep
    if not isinstance(dep, Accumulator):
        raise TypeError(f"deps of a wait are values, found {type(dep).__name__}")
    if dep.used:
        machine.report("accumulator", "registers that a later product adds to are used")
    if dep.value is not None:
        return dep.value
    if dep.product in machine.current.products:
        machine.report("early", f"wait({outstanding}) does not cover {dep.product.what}, whose result it returns")
        return Value(np.full(dep.shape, np.nan, np.float32), gl.float32, machine)
    return Value(dep.product.result.copy(), gl.float32, machine)


def module(machine: Machine) -> SimpleNamespace:
    """What stands for the functions of triton.experimental.gluon.language.nvidia.hopper."""

    def warpgroup_mma_init(value: Value) -> Accumulator:
        if not isinstance(value, Value):
            raise TypeError(f"expected a tensor, found {type(value).__name__}")
        return Accumulator(value.shape, None, value)

    def warpgroup_mma(
        a: Any,
        b: Shared,
        acc: Any,
        *,
        use_acc: Any = True,
        precision: Any = None,
        max_num_imprecise_acc: Any = None,
        is_async: bool = False,
    ) -> Any:
        checked(a, b, acc)
        if isinstance(acc, Value):
            acc = Accumulator(acc.shape, None, acc)
        elif acc.product is not None:
            if acc.used:
                machine.report("accumulator", "two products add to the same registers")
            acc.used = True
        product = Product(machine, a, b, acc, bool(use_acc))
        result = Accumulator(acc.shape, product, None)
        if is_async:
            return result
        return retire(machine, 0, (result, *([a] if isinstance(a, Value) else [])))[0]

    def warpgroup_mma_wait(num_outstanding: int = 0, deps: Sequence[Any] | None = None) -> Any:
        if deps is None:
            raise ValueError("warpgroup_mma_wait deps must be given")
        if isinstance(num_outstanding, Value):
            raise TypeError("num_outstanding must be a constant")
        values = retire(machine, num_outstanding, deps)
        return values[0] if len(values) == 1 else tuple(values)

    return SimpleNamespace(
        warpgroup_mma_init=warpgroup_mma_init, warpgroup_mma=warpgroup_mma, warpgroup_mma_wait=warpgroup_mma_wait
    )
