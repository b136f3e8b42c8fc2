"""The tables of bench_parallel.py, in markdown. Every function is collective."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist

from benchmarks.layout.cost import (
    State,
    activations,
    data_layouts,
    layer_times,
    state_memory,
    state_theory,
    step_traffic,
    tensor_layouts,
)
from llm.config import RunConfig
from llm.parallel.mesh import Mesh
from llm.plan.traffic import payload

MIB, MB = 2**20, 1e6


def layer_table(config: RunConfig, device: torch.device, rounds: int) -> str:
    """On every rank at once, as ranks share a machine when they train."""
    config = replace(config, parallel=replace(config.parallel, tensor_parallel=1, sequence_parallel=False))
    times = layer_times(config, Mesh.create(config.parallel, device.type), device, rounds)
    base = next(iter(times.values()))
    rows = [f"| {name} | {seconds * 1e3:.1f} | {seconds / base:.3f} |" for name, seconds in times.items()]
    return "\n".join(["| layers | forward and backward, ms | ratio |\n|---|---|---|", *rows])


def activation_table(config: RunConfig, device: torch.device, rounds: int) -> str:
    measured = activations(config, device, rounds)
    base = measured["none", 1]
    head = "| recomputed | held after the forward pass, MiB | peak, MiB | ms | time |\n|---|---|---|---|---|"
    rows = [
        f"| {recompute}{f', every {every} blocks' if every > 1 else ''} | {cost.held / MIB:.2f} "
        f"({cost.held / base.held:.0%}) | {cost.peak / MIB:.2f} ({cost.peak / base.peak:.0%}) "
        f"| {cost.seconds * 1e3:.1f} | {cost.seconds / base.seconds:.2f} |"
        for (recompute, every), cost in measured.items()
    ]
    return "\n".join([head, *rows])


def memory_table(config: RunConfig, device: torch.device, rounds: int) -> str:
    rows = ["| layout | " + " | ".join(State._fields) + " | between backward pass and step |\n|---|---|---|---|---|"]
    for name, layout in data_layouts(config):
        measured = state_memory(layout, Mesh.create(layout.parallel, device.type), device)
        theory = state_theory(layout, dist.get_world_size())
        pairs = [*zip(measured, theory, strict=True), (sum(measured), sum(theory))]
        cells = [f"{m / MIB:.2f} / {t / MIB:.2f} = {m / t:.2f}" for m, t in pairs]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(["MiB on rank 0, measured / theory (benchmarks/layout/cost.py says why they differ):", "", *rows])


def traffic_table(config: RunConfig, device: torch.device, rounds: int) -> str:
    world = dist.get_world_size()
    rows = [
        "| layout | collective | ranks | calls | payload, MB | closed form, MB | equal | a rank sends, MB |\n"
        "|---|---|---|---|---|---|---|---|"
    ]
    for name, layout in [*data_layouts(config), *tensor_layouts(config, world)]:
        traffic, expected = (
            step_traffic(layout, Mesh.create(layout.parallel, device.type), device),
            payload(layout, world),
        )
        for collective in sorted({*traffic.volumes, *expected}):
            calls, sent = traffic.volumes.get(collective, (0, 0))
            form = expected[collective]
            rows.append(
                f"| {name} | {collective.kind} | {collective.ranks} | {calls} | {sent / MB:.3f} | {form / MB:.3f} "
                f"| {'yes' if sent == form else 'no'} | {sent * collective.ring_factor / MB:.3f} |"
            )
        rows.append(f"| {name} | scalars | | {traffic.scalars.calls} | {traffic.scalars.payload / MB:.6f} | | | |")
    return "\n".join(rows)
