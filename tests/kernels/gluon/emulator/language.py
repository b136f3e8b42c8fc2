"""What stands for Gluon's modules: functions with the parameters that Triton 3.6 and 3.7 share, and no others."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from triton.experimental.gluon import language as real

from . import barriers, products, shared, tma
from .machine import Agent, Machine
from .memory import Pointer
from .values import (
    Value,
    array_type,
    binary,
    check_shapes,
    common,
    data_as,
    dtype_of,
    elementwise,
    made,
    result,
    rounded,
)

SAME = (  # of the real language: types and layouts, which the emulator passes on and does not interpret
    *("int1", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "bfloat16"),
    *("float32", "pointer_type", "BlockedLayout", "SliceLayout", "DotOperandLayout", "NVMMADistributedLayout"),
    *("NVMMASharedLayout", "SwizzledSharedLayout", "AutoLayout", "DistributedLinearLayout", "CoalescedLayout"),
)
FUNCTIONS: dict[str, Callable] = {
    "exp": np.exp,
    "log": np.log,
    "log2": np.log2,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "floor": np.floor,
    "ceil": np.ceil,
}


def language(machine: Machine) -> SimpleNamespace:
    """triton.experimental.gluon.language, with .nvidia.hopper in it."""
    hopper = products.module(machine)
    hopper.tma, hopper.mbarrier = tma.module(machine), barriers.module(machine)

    def fence_async_shared(cluster: bool = False) -> None:
        shared.fence(machine)

    hopper.fence_async_shared = fence_async_shared
    parts = {name: getattr(real, name) for name in SAME}
    parts |= program(machine) | tensors(machine) | arithmetic(machine) | reductions(machine) | memory(machine)
    return SimpleNamespace(**parts, nvidia=SimpleNamespace(hopper=hopper))


def constant(x: Any) -> Any:
    """gl.constexpr: Python values stand for themselves."""
    if isinstance(x, Value):
        raise TypeError(f"{x} is no constant")
    return x


def program(machine: Machine) -> dict[str, Any]:
    """The grid, constants and partitions."""

    def program_id(axis: int) -> Value:
        return Value(machine.program[axis], real.int32, machine)

    def num_programs(axis: int) -> Value:
        return Value(machine.grid[axis], real.int32, machine)

    def static_assert(cond: Any, msg: str = "") -> None:
        if isinstance(cond, Value):
            raise TypeError("static_assert takes a constant")
        assert cond, msg

    def static_range(arg1: int, arg2: int | None = None, step: int | None = None) -> range:
        bounds = (0, arg1) if arg2 is None else (arg1, arg2)
        return range(*map(constant, bounds), step or 1)

    def device_assert(cond: Any, msg: str = "", mask: Any = None) -> None:
        if not np.all(cond.data if isinstance(cond, Value) else cond):
            machine.report("assert", msg)

    def warp_specialize(functions_and_args: Sequence, worker_num_warps: Sequence, worker_num_regs: Sequence) -> Any:
        workers = len(functions_and_args) - 1
        if workers < 0 or len(worker_num_warps) != workers or len(worker_num_regs) != workers:
            raise TypeError(
                f"{workers} workers, {len(worker_num_warps)} warp and {len(worker_num_regs)} register counts"
            )
        if any(not isinstance(args, tuple) for _, args in functions_and_args):
            raise TypeError("a partition's arguments must be a tuple")
        if any(isinstance(arg, Value) and arg.shape for _, args in functions_and_args[1:] for arg in args):
            raise TypeError("worker partitions take no tensors")
        return partitions(machine, functions_and_args)

    return {
        "constexpr": constant,
        "program_id": program_id,
        "num_programs": num_programs,
        "static_assert": static_assert,
        "static_range": static_range,
        "device_assert": device_assert,
        "warp_specialize": warp_specialize,
    }


def partitions(machine: Machine, functions_and_args: Sequence[tuple[Callable, tuple]]) -> Any:
    """Run the partitions side by side; what the first returns. They know what came before, and it what they did."""
    if len(machine.agents) > 1:
        raise TypeError("warp_specialize within warp_specialize, or twice in a kernel")
    me = machine.current
    names = [function.__name__ for function, _ in functions_and_args]
    children = []
    for i, (function, args) in enumerate(functions_and_args):
        name = f"{names[i]} {names[:i].count(names[i])}" if names.count(names[i]) > 1 else names[i]
        children.append(Agent(machine, name, functools.partial(function, *args), me.clock.copy(), me.time))
    machine.agents += children
    machine.step(lambda: all(child.finished for child in children))
    for child in children:
        me.clock.join(child.clock)
        me.time = max(me.time, child.time)
    return children[0].result


def tensors(machine: Machine) -> dict[str, Any]:
    """Tensors made, and made into another shape."""

    def full(shape: Sequence[int], value: Any, dtype: Any, layout: Any = None) -> Value:
        data = value.data if isinstance(value, Value) else value
        machine.work(math.prod(shape))
        return Value(rounded(np.full(shape, data, array_type(dtype)), dtype), dtype, machine)

    def zeros(shape: Sequence[int], dtype: Any, layout: Any = None) -> Value:
        return full(shape, 0, dtype, layout)

    def full_like(input: Value, value: Any, shape: Any = None, dtype: Any = None, layout: Any = None) -> Value:
        return full(shape or input.shape, value, dtype or input.dtype, layout)

    def zeros_like(input: Value, shape: Any = None, dtype: Any = None, layout: Any = None) -> Value:
        return full_like(input, 0, shape, dtype, layout)

    def arange(start: int, end: int, layout: Any = None) -> Value:
        size = constant(end) - constant(start)
        if size < 1 or size & (size - 1):
            raise ValueError(f"the length of arange must be a power of two, found {size}")
        return Value(np.arange(start, end), real.int32, machine)

    def expand_dims(input: Value, axis: int) -> Value:
        return Value(np.expand_dims(input.data, axis), input.dtype, machine)

    def permute(input: Value, *dims: Any) -> Value:
        return input.permute(*dims)

    def reshape(input: Value, *shape: Any, can_reorder: bool = False) -> Value:
        return input.reshape(*shape)

    def convert_layout(value: Value, layout: Any, assert_trivial: bool = False) -> Value:
        if not isinstance(value, Value) or not value.shape:
            raise TypeError("convert_layout takes a tensor")
        return Value(value.data, value.dtype, machine)

    def set_auto_layout(value: Value, layout: Any) -> Value:
        return convert_layout(value, layout)

    made_here = (full, zeros, full_like, zeros_like, arange, expand_dims, permute, reshape)
    return {function.__name__: function for function in (*made_here, convert_layout, set_auto_layout)}


def arithmetic(machine: Machine) -> dict[str, Any]:
    """Element by element."""

    def maximum(x: Any, y: Any) -> Any:
        return binary("max", as_value(x), y)

    def minimum(x: Any, y: Any) -> Any:
        return binary("min", as_value(x), y)

    def as_value(x: Any) -> Value:
        return x if isinstance(x, Value) else Value(x, dtype_of(x), machine)

    def where(condition: Any, x: Any, y: Any) -> Value:
        dtype = common(x, y)
        sides = [condition.data, data_as(x, dtype), data_as(y, dtype)]
        for one, other in itertools.combinations(sides, 2):
            check_shapes(np.shape(one), np.shape(other))
        return result(np.where(*sides), dtype, machine)

    def fma(x: Any, y: Any, z: Any) -> Value:
        exact = (np.asarray(data_as(v, real.float32), np.float64) for v in (x, y, z))
        a, b, c = exact
        return result((a * b + c).astype(np.float32), real.float32, machine)

    def exp2(x: Value) -> Value:
        return elementwise(np.exp2, x, machine, 1 / machine.costs.exponentials)

    def abs(x: Value) -> Value:
        return result(np.abs(x.data), x.dtype, machine)

    def cast(input: Any, dtype: Any) -> Value:
        return as_value(input).to(dtype)

    def cdiv(x: Any, div: Any) -> Any:
        return (x + div - 1) // div

    def to_tensor(x: Any) -> Value:
        return as_value(x)

    def multiple_of(input: Any, values: Any) -> Any:
        data = input.data if isinstance(input, Value) else input
        if not isinstance(input, Pointer) and np.any(np.asarray(data).flat[0] % values):
            machine.report("assert", f"{data} is no multiple of {values}")
        return input

    def assume(cond: Any) -> None:
        if not cond:
            machine.report("assert", "what the kernel assumes does not hold")

    def floats(name: str, function: Callable) -> Callable:
        def applied(x: Value) -> Value:
            return elementwise(function, x, machine)

        applied.__name__ = name
        return applied

    here = (maximum, minimum, where, fma, exp2, abs, cast, cdiv, to_tensor, multiple_of, assume)
    return {each.__name__: each for each in here} | {name: floats(name, f) for name, f in FUNCTIONS.items()}


def reductions(machine: Machine) -> dict[str, Any]:
    """Along one side of a tensor."""

    def reduced(function: Callable, x: Value, axis: int | None, keep_dims: bool) -> Value:
        if axis is None:
            raise TypeError("the emulator reduces along one axis")
        machine.work(x.data.size)
        return made(function(x.data, axis=axis, keepdims=keep_dims), x.dtype, machine)

    def max(input: Value, axis: int | None = None, *, keep_dims: bool = False) -> Value:
        return reduced(np.fmax.reduce, input, axis, keep_dims)

    def min(input: Value, axis: int | None = None, *, keep_dims: bool = False) -> Value:
        return reduced(np.fmin.reduce, input, axis, keep_dims)

    def sum(input: Value, axis: int | None = None, *, keep_dims: bool = False) -> Value:
        return reduced(np.add.reduce, input, axis, keep_dims)

    return {"max": max, "min": min, "sum": sum}


def memory(machine: Machine) -> dict[str, Any]:
    """Global memory through pointers, and allocations of shared memory."""

    def load(pointer: Pointer, mask: Any = None, other: Any = None) -> Value:
        if not isinstance(pointer, Pointer):
            raise TypeError(f"load from {type(pointer).__name__}")
        return pointer.load(mask, other)

    def store(pointer: Pointer, value: Any, mask: Any = None) -> None:
        if not isinstance(pointer, Pointer):
            raise TypeError(f"store to {type(pointer).__name__}")
        pointer.store(value, mask)

    def allocate_shared_memory(element_ty: Any, shape: Sequence[int], layout: Any, value: Any = None) -> Any:
        return shared.allocate(machine, element_ty, shape, layout, value)

    return {"load": load, "store": store, "allocate_shared_memory": allocate_shared_memory}
