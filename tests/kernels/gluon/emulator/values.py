"""Values in registers: scalars and tensors with the GPU's types, rounding and integer arithmetic.

bfloat16 and float16 are held as float32 rounded to them; all integers as int64, with int32's range checked after each
operation: the GPU would wrap around. // and % round towards zero, as in C and unlike Python's.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from triton.experimental.gluon import language as gl

INT32 = range(-(2**31), 2**31)
NARROW = ("bf16", "fp16")


def rounded(x: np.ndarray, dtype: Any) -> np.ndarray:
    """`x` rounded to a Triton dtype, in the array type that holds it here."""
    if dtype.name == "fp16":
        return np.asarray(x, np.float32).astype(np.float16).astype(np.float32)
    if dtype.name == "bf16":
        x = np.ascontiguousarray(x, np.float32)
        bits = x.view(np.uint32)
        near = ((bits + (((bits >> 16) & 1) + 0x7FFF)) & np.uint32(0xFFFF0000)).view(np.float32)  # ties to even
        return np.where(np.isnan(x), x, near)
    return np.asarray(x).astype(array_type(dtype))


def array_type(dtype: Any) -> type:
    """The numpy type that holds a Triton dtype."""
    if dtype.name == "int1":
        return np.bool_
    if dtype.is_int():
        return np.int64
    if dtype.name in ("fp32", *NARROW):
        return np.float32
    raise TypeError(f"the emulator has no {dtype}")


def quotient(x: Any, y: Any) -> Any:
    """x / y rounded towards zero."""
    return abs(x) // abs(y) * (1 - 2 * ((x < 0) != (y < 0)))


def remainder(x: Any, y: Any) -> Any:
    return x - quotient(x, y) * y


ANY = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}
INTEGER = {
    "floordiv": quotient,
    "mod": remainder,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "lshift": operator.lshift,
    "rshift": operator.rshift,
}
FLOAT = {"truediv": operator.truediv}
LESSER = {"min": np.fmin, "max": np.fmax}  # a NaN is passed over, as on the GPU
COMPARISON = {name: getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")}


class Value:
    """A scalar (`data` a Python or numpy number) or a tensor (an array) that a kernel holds in registers."""

    __slots__ = ("data", "dtype", "machine")

    def __init__(self, data: Any, dtype: Any, machine: Any) -> None:
        self.data, self.dtype, self.machine = data, dtype, machine

    @property
    def shape(self) -> list[int]:
        return list(np.shape(self.data))

    @property
    def type(self) -> SimpleNamespace:
        """Its layout is a stand-in: the emulator keeps none."""
        return SimpleNamespace(layout=gl.AutoLayout(), element_ty=self.dtype, scalar=self.dtype, shape=self.shape)

    def to(self, dtype: Any) -> Value:
        return result(rounded(self.data, dtype), dtype, self.machine, narrow=True)

    def reshape(self, *shape: Any) -> Value:
        return Value(np.reshape(self.data, *shape if np.ndim(shape[0]) else [shape]), self.dtype, self.machine)

    def permute(self, *order: Any) -> Value:
        return Value(np.transpose(self.data, *order if np.ndim(order[0]) else [order]), self.dtype, self.machine)

    def __bool__(self) -> bool:
        if np.ndim(self.data):
            raise TypeError("a tensor has no truth value")
        return bool(self.data)

    def __getitem__(self, key: Any) -> Value:
        key = key if isinstance(key, tuple) else (key,)
        if any(part not in (None, slice(None)) for part in key):
            raise TypeError(f"a tensor takes only : and None as indices, not {key}")
        return Value(self.data[key], self.dtype, self.machine)

    def __neg__(self) -> Value:
        return binary("sub", 0, self)

    def __invert__(self) -> Value:
        return binary("xor", self, self.dtype.name == "int1" or -1)

    def __repr__(self) -> str:
        return f"{self.dtype}{self.shape or [self.data]}"


def _operators() -> None:
    for name in (*ANY, *INTEGER, "truediv"):
        setattr(Value, f"__{name}__", lambda x, y, name=name: binary(name, x, y))
        setattr(Value, f"__r{name}__", lambda x, y, name=name: binary(name, y, x))
    for name in COMPARISON:
        setattr(Value, f"__{name}__", lambda x, y, name=name: binary(name, x, y))


_operators()


def made(data: Any, dtype: Any, machine: Any) -> Value:
    """A value; an array without dimensions becomes a number."""
    if isinstance(data, (np.ndarray, np.generic)) and np.ndim(data) == 0 and not isinstance(data, np.float32):
        data = np.asarray(data)[()] if np.asarray(data).dtype == np.float32 else np.asarray(data).item()
    return Value(data, dtype, machine)


def dtype_of(x: Any) -> Any:
    """The type of a value, or the one that a Python number has when it stands alone."""
    if isinstance(x, Value):
        return x.dtype
    if isinstance(x, bool):
        return gl.int1
    if isinstance(x, int):
        return gl.int32 if x in INT32 else gl.int64
    if isinstance(x, (float, np.floating)):
        return gl.float32
    raise TypeError(f"expected a number or a tensor, found {type(x).__name__} {x!r}")


def common(x: Any, y: Any) -> Any:
    """The type in which two operands meet: a Python number takes the other's, if that is of its kind."""
    a, b = dtype_of(x), dtype_of(y)
    for one, other, number in ((a, b, y), (b, a, x)):
        if one.is_floating() and (other.is_int() or not isinstance(number, Value)):
            return one
        if one.is_int() and other.is_int() and not isinstance(number, Value) and one.name != "int1":
            return gl.int64 if other.name == "int64" else one
    if a.is_floating():
        return a if a.name == b.name else gl.float32
    return max(a, b, key=lambda dtype: dtype.primitive_bitwidth)


def data_as(x: Any, dtype: Any) -> Any:
    """The numbers of an operand, in the type that holds `dtype`."""
    data = x.data if isinstance(x, Value) else x
    if isinstance(data, np.ndarray):
        return data if data.dtype == array_type(dtype) else data.astype(array_type(dtype))
    return np.float32(data) if dtype.is_floating() else bool(data) if dtype.name == "int1" else int(data)


def binary(name: str, x: Any, y: Any) -> Any:
    """x <operator> y as the GPU computes it; x or y is a Value. NotImplemented for what is no number."""
    if not all(isinstance(z, (Value, int, float, np.floating)) for z in (x, y)):
        return NotImplemented
    machine = x.machine if isinstance(x, Value) else y.machine
    dtype = common(x, y)
    if name == "truediv" and dtype.is_int():
        dtype = gl.float32
    elif dtype.name == "int1" and name in ("add", "sub", "mul", "floordiv", "mod", "lshift", "rshift"):
        dtype = gl.int32
    table = COMPARISON if name in COMPARISON else ANY | LESSER | (FLOAT if dtype.is_floating() else INTEGER)
    if name not in table:
        raise TypeError(f"{name} of {dtype}")
    a, b = data_as(x, dtype), data_as(y, dtype)
    check_shapes(np.shape(a), np.shape(b))
    if name in ("floordiv", "mod") and not np.all(b):
        machine.report("division", "an integer is divided by zero")
        b = np.where(b == 0, 1, b)
    return result(table[name](a, b), gl.int1 if name in COMPARISON else dtype, machine)


def result(data: Any, dtype: Any, machine: Any, narrow: bool = False) -> Value:
    """A computed value: narrow floats rounded, unless they are `narrow` already, and int32 checked."""
    machine.work(np.size(data))
    if dtype.name in NARROW and not narrow:
        data = rounded(data, dtype)
    elif dtype.name == "int32" and np.size(data):
        low, high = (data.min(), data.max()) if isinstance(data, np.ndarray) else (data, data)
        if low < INT32.start or high >= INT32.stop:
            machine.report("overflow", f"{low if low < INT32.start else high} does not fit int32")
            data = (data + 2**31) % 2**32 - 2**31
    return made(data, dtype, machine)


def check_shapes(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    """Raise ValueError for shapes that Gluon does not broadcast: unlike numpy, it adds no dimensions of its own."""
    if a and b and (len(a) != len(b) or any(m != n and 1 not in (m, n) for m, n in zip(a, b, strict=True))):
        raise ValueError(f"shapes {list(a)} and {list(b)} do not broadcast")


def elementwise(function: Callable, x: Any, machine: Any, clocks: float = 0) -> Value:
    """A float function of a value; `clocks`: assumed cost of an element beyond that of any operation."""
    dtype = dtype_of(x)
    if not dtype.is_floating():
        raise TypeError(f"expected floats, found {dtype}")
    machine.work(np.size(x.data if isinstance(x, Value) else x), clocks)
    return result(function(data_as(x, dtype)), dtype, machine)
