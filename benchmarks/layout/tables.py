"""The tables of benchmarks.layout, as lines of Markdown. Every function is collective."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist

from benchmarks.layout.cost import (
    activations,
    data_layouts,
    layer_times,
    state_memory,
    step_traffic,
    tensor_layouts,
)
from benchmarks.report import table
from llm.config import RunConfig
from llm.parallel.mesh import Mesh
from llm.plan.memory import TrainingState, training_state
from llm.plan.traffic import payload

MIB, MB = 2**20, 1e6


def layer_table(config: RunConfig, device: torch.device, rounds: int) -> list[str]:
    """On every rank at once, as ranks share a machine when they train."""
    config = replace(config, parallel=replace(config.parallel, tensor_parallel=1, sequence_parallel=False))
    times = layer_times(config, Mesh.create(config.parallel, device.type), device, rounds)
    base = next(iter(times.values()))
    rows = [[name, f"{seconds * 1e3:.1f}", f"{seconds / base:.3f}"] for name, seconds in times.items()]
    return table(["layers", "forward and backward, ms", "ratio"], rows)


def activation_table(config: RunConfig, device: torch.device, rounds: int) -> list[str]:
    measured = activations(config, device, rounds)
    base = measured["none", 1]
    rows = []
    for (recompute, every), cost in measured.items():
        sizes = [(cost.held, base.held), (cost.peak, base.peak)]
        cells = [f"{size / MIB:.2f} ({size / of:.0%})" for size, of in sizes]
        name = f"{recompute}{f', every {every} blocks' if every > 1 else ''}"
        rows.append([name, *cells, f"{cost.seconds * 1e3:.1f}", f"{cost.seconds / base.seconds:.2f}"])
    return table(["recomputed", "held after the forward pass, MiB", "peak, MiB", "ms", "time"], rows)


def memory_table(config: RunConfig, device: torch.device, rounds: int) -> list[str]:
    rows = []
    for name, layout in data_layouts(config):
        measured = state_memory(layout, Mesh.create(layout.parallel, device.type), device)
        theory = training_state(layout, dist.get_world_size())
        pairs = [*zip(measured, theory, strict=True), (sum(measured), sum(theory))]
        rows.append([name, *(f"{m / MIB:.2f} / {t / MIB:.2f} = {m / t:.2f}" for m, t in pairs)])
    title = "MiB on rank 0, measured / theory (`training_state` says why they differ):"
    return [title, "", *table(["layout", *TrainingState._fields, "between backward pass and step"], rows)]


def traffic_table(config: RunConfig, device: torch.device, rounds: int) -> list[str]:
    world, rows = dist.get_world_size(), []
    for name, layout in [*data_layouts(config), *tensor_layouts(config, world)]:
        traffic = step_traffic(layout, Mesh.create(layout.parallel, device.type), device)
        expected = payload(layout, world)
        for collective in sorted({*traffic.volumes, *expected}):
            calls, sent = traffic.volumes.get(collective, (0, 0))
            form, equal = expected[collective], "yes" if sent == expected[collective] else "no"
            sizes = [f"{sent / MB:.3f}", f"{form / MB:.3f}", equal, f"{sent * collective.ring_factor / MB:.3f}"]
            rows.append([name, collective.kind, f"{collective.ranks}", f"{calls}", *sizes])
        scalars = traffic.scalars
        rows.append([name, "scalars", "", f"{scalars.calls}", f"{scalars.payload / MB:.6f}", "", "", ""])
    sizes = ["payload, MB", "closed form, MB", "equal", "a rank sends, MB"]
    return table(["layout", "collective", "ranks", "calls", *sizes], rows)
