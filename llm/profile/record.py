"""What one rank's profile says: rank-N.json, written by llm/profile/capture.py and read by reports.

Times are milliseconds per profiled step, counts and bytes too, unless a field says otherwise. A part is a piece of the
model or of the step (llm/profile/ranges.py). The times of the parts, each exclusive of the others, and
`unattributed_ms` add up to the step's wall time: on a GPU they are those of the host's thread, and `device_ms` those
of its kernels.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from llm import files
from llm.typed import read


@dataclasses.dataclass(frozen=True)
class Part:
    """One of llm.profile.ranges.PARTS."""

    name: str
    forward_ms: float
    """Of a part of the step, such as the optimizer, all of its time."""
    backward_ms: float
    recompute_ms: float
    """Forward passes made again in the backward pass (activation checkpointing)."""
    device_ms: float
    """Of its kernels on the GPU, all three; 0 on a CPU."""
    flops: float
    """Counted from the shapes of its matrix products and attention, recomputation included."""
    bytes: float
    """Read and written: an estimate from the shapes of its operations' tensors."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """A kind of collective of one group size."""

    name: str
    group_size: int
    count: float
    ms: float
    exposed_ms: float
    """While this rank computed nothing."""
    bytes: float
    """Of its inputs."""


@dataclasses.dataclass(frozen=True)
class Host:
    """The CPU's side."""

    launches: float
    """Kernels launched on a GPU; operations called on a CPU."""
    gap_ms: float
    """A GPU's time without a kernel; a CPU's without an operation."""
    python_ms: float
    """The main thread's time outside all operations and collectives."""


@dataclasses.dataclass(frozen=True)
class Sync:
    """The host waits for the device, or reads a number of it."""

    where: str
    """file:line where the stack is known, else the part."""
    count: float
    ms: float


@dataclasses.dataclass(frozen=True)
class Op:
    """An operation of the main thread in one part; the 20 that take longest."""

    name: str
    part: str
    count: float
    ms: float
    """Exclusive of the operations that it calls."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """What this device can do, measured in the same run in train.precision."""

    matmul_tflops: float
    copy_gbs: float
    """Bytes read and written per second of a large copy, in 10^9."""


@dataclasses.dataclass(frozen=True)
class Loader:
    wait_ms: float
    """The trainer waited for the loader, and for copies to the GPU."""


@dataclasses.dataclass(frozen=True)
class Owner:
    """Who holds memory at the peak: the part that allocated it, or a weight's name."""

    name: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class Memory:
    """Live bytes of tensors over one step of its own, without the profiler."""

    peak_bytes: int
    categories: dict[str, int]
    """At the peak: weights, gradients, moments, activations, temporary."""
    unattributed_bytes: int
    """peak_bytes without the categories."""
    owners: tuple[Owner, ...]
    """The ten that hold most at the peak."""
    over_step: tuple[tuple[float, int], ...]
    """Samples (milliseconds since the step began, live bytes)."""


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokens per step."""

    rank: int
    """Of this rank's micro-batches; tensor-parallel ranks share them."""
    world: int
    """Of the global batch."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One rank's profile."""

    rank: int
    world: int
    host: str
    device: str
    """"cpu", or the GPU's name."""
    layout: dict[str, str | int]
    """tp, dp, engine, zero_stage, micro_batch, grad_accum, seq_len, recompute, precision, impl, ..."""
    steps: tuple[int, int]
    """The first and the last profiled."""
    tokens_per_step: Tokens
    step_ms: float
    """Mean wall time of the profiled steps."""
    unprofiled_step_ms: float
    """That of as many steps right before; the profiler's overhead is the ratio less 1."""
    busy_ms: tuple[float, ...]
    """Of each profiled step, without what the rank waited for: other ranks and its loader. On a GPU one mean of all,
    since the host's steps are not the GPU's."""
    machine: Machine
    parts: tuple[Part, ...]
    unattributed_ms: float
    collectives: tuple[Collective, ...]
    host_time: Host
    syncs: tuple[Sync, ...]
    ops: tuple[Op, ...]
    loader: Loader
    memory: Memory

    def write(self, path: Path) -> None:
        files.write_json(path, dataclasses.asdict(self))

    @staticmethod
    def load(path: Path) -> Record:
        """Raises CheckpointError or InputError if the file is no record, ReadError if it cannot be read."""
        return read(Record, files.read_json(path), str(path))
