"""Measures what a layout costs on this machine: memory of the training state, and recomputation.

Batches are random tokens, since nothing measured depends on the text. A function that takes a mesh is collective, and
returns this rank's result.
"""

import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist

from benchmarks.clock import clock_of, compare, summary
from benchmarks.layout.counters import LiveStorages
from benchmarks.report import table
from llm.config import ParallelConfig, RunConfig
from llm.model.gpt import GPT, Recompute
from llm.parallel.mesh import Mesh
from llm.parallel.parallelize import choose_layers
from llm.parity.batches import micro_batches, target_count
from llm.plan.memory import TrainingState, training_state
from llm.train.build import build_engine
from llm.train.engines.base import DTYPES, MicroBatch

MIB = 2**20  # bytes
# By default DeepSpeed keeps parameters below 100,000 elements whole under ZeRO 3, and allocates a bucket for reductions
# of 500 million elements, however small the model.
AS_IN_THEORY = {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 100_000}


def state_memory(config: RunConfig, mesh: Mesh, device: torch.device) -> TrainingState:
    """Measured over the second step: the first one allocates what stays."""
    with LiveStorages(existing=False) as memory:  # earlier engines, full of cycles, may be freed meanwhile
        engine = build_engine(config, mesh, device)
        engine.set_lr(config.optim.lr)
        alive = [_settled(memory)]
        made_up = partial(micro_batches, config, device=device, dp_rank=mesh.dp_rank, dp_size=mesh.dp_size)
        for step in range(2):
            # The batches are in no variable: it would keep them alive where memory is counted.
            engine.forward_backward(made_up(step), target_count(config))
            alive.append(_settled(memory))
            engine.step()
            alive.append(_settled(memory))
        engine.close()
    built, between, after = alive[0], alive[-2], alive[-1]
    return TrainingState(built, after - built, between - after)


def _settled(memory: LiveStorages) -> int:
    """Bytes that live once nothing more is freed: a backward pass's threads may let go of its last tensors after it."""
    before, now = -1, memory.live()
    while before != now:
        gc.collect()
        time.sleep(0.02)
        before, now = now, memory.live()
    return now


class Activations(NamedTuple):
    """Of one micro-batch.

    held: bytes alive after the forward pass and not before it. peak: the most bytes alive during the forward and the
    backward pass, less those before; gradients included. ms: median of forward and backward.
    """

    held: int
    peak: int
    ms: float


# train.activation_checkpointing, train.checkpoint_every
RECOMPUTED: Sequence[tuple[Recompute, int]] = (("none", 1), ("selective", 1), ("full", 2), ("full", 1))


def activations(config: RunConfig, device: torch.device, rounds: int) -> dict[tuple[Recompute, int], Activations]:
    """By (train.activation_checkpointing, train.checkpoint_every), for a dense model on one rank; timed in turns."""
    batch, models = micro_batches(config, 0, device, ragged=False)[0], {}
    for recompute, every in RECOMPUTED:
        model = GPT(config.model, choose_layers(config, None), None, recompute, every)
        models[recompute, every] = model.to(device=device, dtype=DTYPES[config.train.precision])
    held = {key: _activation_bytes(model, batch) for key, model in models.items()}
    steps = {key: partial(_step, model, batch) for key, model in models.items()}
    samples = compare(clock_of(device, cold=False), steps, rounds)
    return {key: Activations(*held[key], summary(samples[key])["ms"]) for key in models}


def _step(model: GPT, batch: MicroBatch) -> None:
    model.zero_grad(set_to_none=True)
    model(*batch).backward()


def _activation_bytes(model: GPT, batch: MicroBatch) -> tuple[int, int]:
    model(*batch).backward()  # what is allocated once
    model.zero_grad(set_to_none=True)
    with LiveStorages() as memory:
        before = memory.live()
        loss = model(*batch)
        held = memory.live() - before
        loss.backward()
        peak = memory.peak - before
    model.zero_grad(set_to_none=True)
    return held, peak


def data_layouts(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """Every engine that shards and every stage, over data-parallel ranks alone, by name."""
    parallel = ParallelConfig(timeout_seconds=config.parallel.timeout_seconds)
    for precision in ("fp32", "bf16"):
        # DeepSpeed's bf16 needs a stage from 1 on; FSDP2 shards as stages 2 and 3 do.
        engines = [("deepspeed", stage) for stage in range(precision == "bf16", 4)] + [("fsdp", 2), ("fsdp", 3)]
        for engine, stage in engines:
            train = replace(config.train, engine=engine, precision=precision)
            deepspeed = {"zero_optimization": AS_IN_THEORY} if engine == "deepspeed" else {}
            layout = replace(config, train=train, parallel=replace(parallel, zero_stage=stage), deepspeed=deepspeed)
            yield f"{'FSDP2 as ' * (engine == 'fsdp')}ZeRO {stage}, {precision}", layout


def activation_table(config: RunConfig, device: torch.device, rounds: int) -> list[str]:
    measured = activations(config, device, rounds)
    base = measured["none", 1]
    rows = []
    for (recompute, every), cost in measured.items():
        sizes = [(cost.held, base.held), (cost.peak, base.peak)]
        cells = [f"{size / MIB:.2f} ({size / of:.0%})" for size, of in sizes]
        name = f"{recompute}{f', every {every} blocks' if every > 1 else ''}"
        rows.append([name, *cells, f"{cost.ms:.1f}", f"{cost.ms / base.ms:.2f}"])
    return table(["recomputed", "held after the forward pass, MiB", "peak, MiB", "ms", "time"], rows)


def memory_table(config: RunConfig, device: torch.device, rounds: int) -> list[str]:
    rows = []
    for name, layout in data_layouts(config):
        measured = state_memory(layout, Mesh.create(layout.parallel, device.type), device)
        theory = training_state(layout, dist.get_world_size())
        pairs = [*zip(measured, theory, strict=True), (sum(measured), sum(theory))]
        rows.append([name, *(f"{m / MIB:.2f} / {t / MIB:.2f} = {m / t:.2f}" for m, t in pairs)])
    title = "MiB on rank 0, measured / theory (docs/parallelism.md says why they differ):"
    return [title, "", *table(["layout", *TrainingState._fields, "between backward pass and step"], rows)]
