"""Global memory: the tensors of a launch, as pointers and as TMA descriptors, with bounds and owners."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from triton.experimental.gluon import language as gl

from .machine import Machine
from .values import INT32, Value, array_type, made, rounded

DTYPES = {
    torch.float32: gl.float32,
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.int32: gl.int32,
    torch.int64: gl.int64,
    torch.bool: gl.int1,
}


class Storage:
    """The elements of a torch tensor's storage, flat, and who has stored each (0: nobody)."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        self.dtype = DTYPES[tensor.dtype]
        wide = self.tensor.float() if tensor.dtype.is_floating_point else self.tensor
        self.values = np.array(wide.numpy(), array_type(self.dtype))
        self.unset = np.isnan(self.values) if tensor.dtype.is_floating_point else np.zeros(self.values.size, np.bool_)
        self.owner = np.zeros(self.values.size, np.int32)

    def store(self, machine: Machine, name: str, at: np.ndarray, values: np.ndarray) -> None:
        """Store at flat offsets, and report elements that another CTA or partition has stored before."""
        me = machine.cta * 8 + machine.agents.index(machine.current) + 1
        before = self.owner[at]
        if ((before != 0) & (before != me)).any():
            offset = at[(before != 0) & (before != me)].flat[0]
            machine.report("double store", f"element {offset} of {name} was stored by another CTA or partition")
        self.owner[at], self.values[at] = me, values

    def check_read(self, machine: Machine, name: str, at: np.ndarray) -> None:
        """A kernel may not read what another of its CTAs stores: nothing orders them."""
        owners = self.owner[at]
        if ((owners != 0) & ((owners - 1) // 8 != machine.cta)).any():
            machine.report("race", f"{name} is read where another CTA has stored")

    def write_back(self) -> None:
        stored = np.flatnonzero(self.owner)
        if len(stored):
            self.tensor[torch.from_numpy(stored)] = torch.from_numpy(self.values[stored]).to(self.tensor.dtype)


class Pointer:
    """A pointer, or a tensor of pointers: `offsets` in elements from the tensor's first."""

    def __init__(self, world: World, name: str, tensor: torch.Tensor, offsets: Any = 0) -> None:
        self.world, self.name, self.tensor, self.offsets = world, name, tensor, offsets
        self.dtype = gl.pointer_type(DTYPES[tensor.dtype])

    @property
    def shape(self) -> list[int]:
        return list(np.shape(self.offsets))

    def __add__(self, offset: Any) -> Pointer:
        data = offset.data if isinstance(offset, Value) else offset
        if isinstance(offset, Value) and not offset.dtype.is_int():
            raise TypeError(f"a pointer plus {offset}")
        return Pointer(self.world, self.name, self.tensor, self.offsets + data)

    __radd__ = __add__

    def __sub__(self, offset: Any) -> Pointer:
        return self + (0 - offset)

    def _picked(self, mask: Any) -> tuple[np.ndarray, np.ndarray, Storage]:
        """Offsets in the storage, which elements to access, and the storage."""
        keep = True if mask is None else mask.data if isinstance(mask, Value) else mask
        offsets, keep = np.broadcast_arrays(np.asarray(self.offsets), np.asarray(keep, np.bool_))
        extent = 1 + sum((n - 1) * step for n, step in zip(self.tensor.shape, self.tensor.stride(), strict=True))
        outside = keep & ((offsets < 0) | (offsets >= extent))
        if outside.any():
            text = f"{self.name}: offset {offsets[outside].flat[0]} of a tensor that spans {extent} elements"
            self.world.machine.report("bounds", text)
        keep = keep & ~outside
        return np.where(keep, offsets, 0) + self.tensor.storage_offset(), keep, self.world.storage(self.tensor)

    def load(self, mask: Any, other: Any) -> Value:
        """What stands there. Masked elements are `other`; without it anything, here NaN or a strange integer."""
        machine = self.world.machine
        agent = machine.step()
        at, keep, storage = self._picked(mask)
        storage.check_read(machine, self.name, at[keep])
        if other is None:
            other = np.nan if storage.dtype.is_floating() else 0x5A5A5A5A
        other = other.data if isinstance(other, Value) else other
        agent.wait_until(agent.time + machine.costs.latency)
        return made(np.where(keep, storage.values[at], np.asarray(other, storage.values.dtype)), storage.dtype, machine)

    def store(self, value: Any, mask: Any) -> None:
        machine = self.world.machine
        machine.step()
        at, keep, storage = self._picked(mask)
        data = np.broadcast_to(value.data if isinstance(value, Value) else value, at.shape)
        storage.store(machine, self.name, at[keep], rounded(data[keep], storage.dtype))


class Descriptor:
    """A TMA descriptor. Elements outside of the tensor are read as zeros and not stored."""

    def __init__(self, world: World, name: str, host: Any) -> None:
        self.world, self.name, self.layout = world, name, host.layout
        self.block_shape, self.sides, self.strides = list(host.block_shape), list(host.shape), list(host.strides)
        self.base = host.base
        self.dtype = DTYPES[host.base.dtype]
        size = int(np.prod(self.block_shape)) * self.dtype.primitive_bitwidth // 8
        self.block_type = SimpleNamespace(shape=self.block_shape, nbytes=size, element_ty=self.dtype)

    shape = property(lambda self: [made(side, gl.int32, self.world.machine) for side in self.sides])

    def coordinates(self, coord: Sequence[Any]) -> list[int]:
        numbers = [int(x.data) if isinstance(x, Value) else int(x) for x in coord]
        if len(numbers) != len(self.sides):
            raise TypeError(f"{self.name} has {len(self.sides)} sides, found coordinates {numbers}")
        if numbers[-1] * self.dtype.primitive_bitwidth // 8 % 16:
            self.world.machine.report("alignment", f"{self.name}: the last coordinate {numbers[-1]} is not on 16 bytes")
        return numbers

    def _clipped(self, coord: list[int], flat: np.ndarray) -> tuple[np.ndarray, tuple[slice, ...]]:
        """The part of the block inside of the tensor, as a view of `flat`; where in the block it lies."""
        step = flat.itemsize
        whole = as_strided(flat[self.base.storage_offset() :], self.sides, [step * n for n in self.strides])
        low = [min(max(c, 0), n) for c, n in zip(coord, self.sides, strict=True)]
        high = [max(a, min(c + b, n)) for a, c, b, n in zip(low, coord, self.block_shape, self.sides, strict=True)]
        world = tuple(map(slice, low, high))
        inside = tuple(slice(a - c, z - c) if z > a else slice(0) for a, z, c in zip(low, high, coord, strict=True))
        return whole[world], inside

    def read(self, coord: list[int]) -> np.ndarray:
        storage = self.world.storage(self.base)
        block = np.zeros(self.block_shape, storage.values.dtype)
        values, inside = self._clipped(coord, storage.values)
        block[inside] = values
        if storage.owner.any():
            storage.check_read(self.world.machine, self.name, self._clipped(coord, np.arange(storage.values.size))[0])
        return block

    def write(self, coord: list[int], block: np.ndarray) -> None:
        storage = self.world.storage(self.base)
        at, inside = self._clipped(coord, np.arange(storage.values.size))
        storage.store(self.world.machine, self.name, at, block[inside])


class World:
    """All tensors of a launch; those in one storage share it here as well."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.storages: dict[int, Storage] = {}
        self.tensors: dict[str, torch.Tensor] = {}

    def storage(self, tensor: torch.Tensor) -> Storage:
        return self.storages[tensor.untyped_storage().data_ptr()]

    def argument(self, name: str, value: Any) -> Any:
        """What a kernel gets for an argument of its launch that is no constexpr."""
        tensor = getattr(value, "base", value)
        if isinstance(tensor, torch.Tensor):
            key = tensor.untyped_storage().data_ptr()
            if key not in self.storages:
                self.storages[key] = Storage(tensor)
            self.tensors[name] = tensor
            kind = Pointer if tensor is value else Descriptor
            return kind(self, name, value)
        if value is None:
            return None
        if isinstance(value, bool):
            return Value(value, gl.int1, self.machine)
        if isinstance(value, int):
            return Value(value, gl.int32 if value in INT32 else gl.int64, self.machine)
        if isinstance(value, float):
            return Value(np.float32(value), gl.float32, self.machine)
        raise TypeError(f"{name}: the emulator takes no {type(value).__name__}")

    def check_end(self) -> None:
        """Report what was NaN and was not stored in a tensor that the kernel stores to."""
        for name, tensor in self.tensors.items():
            storage, first = self.storage(tensor), tensor.storage_offset()
            owner, unset = (
                as_strided(flat[first:], tensor.shape, [flat.itemsize * step for step in tensor.stride()])
                for flat in (storage.owner, storage.unset)
            )
            never = unset & (owner == 0)
            if owner.any() and never.any():
                text = f"{never.sum()} of {never.size} elements of {name}, the first {never.argmax()}"
                self.machine.report("never stored", text)

    def write_back(self) -> None:
        """Write what was stored into the torch tensors."""
        for storage in self.storages.values():
            storage.write_back()
