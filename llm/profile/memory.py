"""Whose the live memory is over one step: what lives before it, and each allocation that the profiler saw in it.

A block that was allocated in the step is

- a gradient, if the forward and backward passes made it outside the model's forward pass and the update finds it,
- an activation, if a layer's forward pass made it and it outlives that layer's range,
- else temporary: workspaces, gradients of activations.

What lives before the step is a weight, a gradient or a moment, or else a buffer of the engine's, temporary too.
"""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llm.model.parts import MODEL_PARTS
from llm.profile.ranges import PREFIX
from llm.profile.record import Memory, Owner
from llm.profile.trace import Event, Frame, Sweep, host_events

CATEGORIES: tuple[str, ...] = ("weights", "gradients", "moments", "activations", "temporary")
LAYER_RANGES = {PREFIX + name for name in (*MODEL_PARTS, "model", "block")}
SAMPLES = 200
OURS = ("/llm/", "/launch/", "/kernels/", "/benchmarks/", "/tests/")


@dataclass
class Block:
    """Memory from one event of the allocator to another, by their numbers; -1: before the first."""

    bytes: int
    owner: str
    category: str | None
    born: int
    phase: str = ""
    scope_end: float = 0.0
    """When the layer that allocated it ends; 0: none did."""
    died: int = sys.maxsize
    died_at: float = float("inf")


def live_blocks(known: Iterable[tuple[str, str, Tensor]], device: torch.device) -> dict[int, Block]:
    """The storages that live on `device`, by address: of (category, owner, tensor), and all others as "buffers".

    Others are those that Python can reach, but memory that is only borrowed, such as the loader's, and the tensors
    without memory that torch.compile traces with. The first has it.
    """
    tensors = [each for each in gc.get_objects() if type(each) in (Tensor, torch.nn.Parameter)]
    real = [each for each in tensors if not torch._is_functional_tensor(each)]
    here = [each for each in real if each.device.type == device.type and each.layout == torch.strided]
    buffers = (("temporary", "buffers", each) for each in here if each.untyped_storage().resizable())
    found: dict[int, Block] = {}
    for category, owner, tensor in (*known, *buffers):
        storage = tensor.untyped_storage()
        if tensor.device.type == device.type and storage.nbytes():
            found.setdefault(storage.data_ptr(), Block(storage.nbytes(), owner, category, -1))
    return found


@dataclass
class MemorySweep(Sweep):
    """Also follows the allocator of one kind of device: 0 a CPU, 1 a GPU."""

    device_type: int = 0
    live: dict[int, Block] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=list)
    changes: list[tuple[float, int]] = field(default_factory=list)
    """(time, bytes) of each event."""
    update_at: int = sys.maxsize
    """The number of the first event in the update."""

    def instant(self, event: Event) -> None:
        args = event["args"]
        if event["name"] != "[memory]" or args["Device Type"] != self.device_type:
            return
        number, size, address = len(self.changes), args["Bytes"], args["Addr"]
        if any(frame.name == PREFIX + "update" for frame in self.stack):
            self.update_at = min(self.update_at, number)
        self.changes.append((event["ts"], size))
        if size > 0:
            frame: Frame = self.stack[-1]
            scope = next((f.end for f in reversed(self.stack) if f.name in LAYER_RANGES), 0.0)
            self.live[address] = Block(size, frame.part or "none", None, number, frame.phase, scope)
            self.blocks.append(self.live[address])
        elif (block := self.live.pop(address, None)) is not None:
            block.died, block.died_at = number, event["ts"]

    def category(self, block: Block) -> str:
        if block.category is not None:
            return block.category
        in_forward = block.phase != "backward" and block.scope_end > 0
        if not in_forward and block.born < self.update_at < block.died:
            return "gradients"
        return "activations" if in_forward and block.died_at > block.scope_end else "temporary"


def analyse_memory(events: list[Event], before: Mapping[int, Block], total: int, device: torch.device) -> Memory:
    """events: of one profiled step, with its allocations; before it `before` was live, of `total` bytes in all."""
    sweep = MemorySweep(device_type=int(device.type == "cuda"), live=dict(before), blocks=list(before.values()))
    sweep.run(host_events(events))
    running, levels = total, [total]
    for _, size in sweep.changes:
        running += size
        levels.append(running)
    peak = levels.index(max(levels)) - 1  # the event that reached it; -1: it was before all
    categories, owners = Counter[str](dict.fromkeys(CATEGORIES, 0)), Counter[str]()
    for block in sweep.blocks:
        if block.born <= peak < block.died:
            category = sweep.category(block)
            categories[category] += block.bytes
            owners[f"{category} of {block.owner}"] += block.bytes
    start = sweep.steps[0][0]
    samples = [
        (0.0, total),
        *(((at - start) * 1e-3, level) for (at, _), level in zip(sweep.changes, levels[1:], strict=True)),
    ]
    width = -(-len(samples) // SAMPLES)
    highest = [max(samples[i : i + width], key=lambda sample: sample[1]) for i in range(0, len(samples), width)]
    return Memory(
        max(levels), dict(categories), max(levels) - categories.total(),
        tuple(Owner(name, size) for name, size in owners.most_common(10)), tuple(highest),
    )  # fmt: skip


class WaitPlaces(TorchDispatchMode):
    """Notes the line of ours from which the host reads a number of a tensor, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        to_host = (
            func is torch.ops.aten._to_copy.default and args[0].is_cuda and kwargs.get("device") == torch.device("cpu")
        )
        if func is torch.ops.aten._local_scalar_dense.default or to_host:
            self.places.append(_place())
        return func(*args, **(kwargs or {}))


def _place() -> str:
    """file:line of the innermost caller that is no code of torch's or of the profiler's."""
    frame = sys._getframe(2)
    while frame.f_back is not None:
        path = frame.f_code.co_filename
        found = max(path.rfind(room) for room in OURS)
        if found >= 0 and "/site-packages/" not in path and "/llm/profile/" not in path:
            return f"{path[found + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return "unknown"
