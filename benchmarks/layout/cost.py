"""What a layout costs, measured on this machine: time of the parallel layers, memory, bytes sent.

Batches are random tokens: nothing measured here depends on the text. Every function is collective where it takes a
mesh; its result is this rank's.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

import torch

from benchmarks.clock import clock_of, compare, summary
from benchmarks.layout.counters import LiveStorages, Traffic
from llm.config import ParallelConfig, RunConfig
from llm.model.gpt import GPT, Recompute
from llm.model.init import init_weights
from llm.model.layers import DenseLayers
from llm.parallel.layers import TensorParallel, TensorParallelLayers
from llm.parallel.mesh import Mesh
from llm.parity.batches import micro_batches, target_count
from llm.plan.memory import TrainingState
from llm.train.build import build_engine
from llm.train.engines.base import DTYPES, MicroBatch

T = TypeVar("T")
# By default DeepSpeed keeps parameters below 100,000 elements whole under ZeRO 3, and allocates a bucket for reductions
# of 500 million elements, however small the model.
AS_IN_THEORY = {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 100_000}


class Meter(Protocol):
    """Bytes that are alive now, and the most there were since `reset_peak`."""

    @property
    def peak(self) -> int: ...

    def live(self) -> int: ...

    def reset_peak(self) -> None: ...


class CudaMemory:
    """What the allocator of the current GPU says, rounding of blocks and operators' work space included."""

    @property
    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()

    def live(self) -> int:
        return torch.cuda.memory_allocated()

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()


@contextmanager
def meter(device: torch.device) -> Iterator[Meter]:
    """CudaMemory on a GPU, which has it for nothing; else LiveStorages."""
    if device.type == "cuda":
        yield CudaMemory()
    else:
        with LiveStorages() as storages:
            yield storages


def initial(model: GPT, config: RunConfig, device: torch.device) -> GPT:
    """The model at its initial weights, in the precision of its computation."""
    init_weights(model, config.model, config.seed)
    return model.to(device=device, dtype=DTYPES[config.train.precision])


def step_seconds(models: Mapping[T, GPT], batch: MicroBatch, rounds: int) -> dict[T, float]:
    """Median seconds of a forward and a backward pass of each model, in turns."""

    def step(model: GPT) -> None:
        model.zero_grad(set_to_none=True)
        model(*batch).backward()

    clock = clock_of(batch.tokens.device, cold=False)
    samples = compare(clock, {key: partial(step, model) for key, model in models.items()}, rounds)
    return {key: summary(found)["ms"] / 1e3 for key, found in samples.items()}


# --- the parallel layers on one tensor-parallel rank, beside plain ones ---


def layer_times(config: RunConfig, mesh: Mesh, device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds of forward and backward with nn.Linear and with the parallel layers at a degree of 1.

    `mesh`: of tensor-parallel groups of one rank.
    """
    assert mesh.tp_size == 1, f"{mesh.tp_size} tensor-parallel ranks; expected 1"
    seed, impl = config.seed, config.train.impl
    layers = {
        "nn.Linear": DenseLayers(seed=seed, impl=impl),
        "parallel layers, TP 1": TensorParallelLayers(TensorParallel.of(mesh.tp_group), seed=seed, impl=impl),
    }
    models = {name: initial(GPT(config.model, factory), config, device) for name, factory in layers.items()}
    return step_seconds(models, micro_batches(config, 0, device, ragged=False)[0], rounds)


# --- two steps of an engine: memory of the training state, bytes sent ---


def two_steps(config: RunConfig, mesh: Mesh, device: torch.device) -> Iterator[None]:
    """Build the engine and take two steps; yields after building, after each backward pass and after each update.

    What is measured is the second step: the first one allocates what stays, and DeepSpeed's ZeRO 3 traces it.
    """
    engine = build_engine(config, mesh, device)
    engine.set_lr(config.optim.lr)
    yield
    ranks = {"dp_rank": mesh.dp_rank, "dp_size": mesh.dp_size}
    for step in range(2):
        # Not kept in a variable, which would live on where memory is counted.
        engine.forward_backward(
            micro_batches(config, step, device, **ranks, ragged=False), target_count(config, ragged=False)
        )
        yield
        engine.step()
        yield
    engine.close()


def state_memory(config: RunConfig, mesh: Mesh, device: torch.device) -> TrainingState:
    with LiveStorages(existing=False) as memory:  # earlier engines, full of cycles, may be freed meanwhile
        built, _, _, between, after = [_settled(memory) for _ in two_steps(config, mesh, device)]
    return TrainingState(built, after - built, between - after)


def _settled(memory: LiveStorages) -> int:
    """Bytes that live once nothing more is freed: a backward pass's threads may let go of its last tensors after it."""
    before, now = -1, memory.live()
    while before != now:
        gc.collect()
        time.sleep(0.02)
        before, now = now, memory.live()
    return now


def step_traffic(config: RunConfig, mesh: Mesh, device: torch.device) -> Traffic:
    steps = two_steps(config, mesh, device)
    for _ in range(3):  # up to the end of the first step
        next(steps)
    with Traffic() as traffic:
        for _ in steps:
            pass
    return traffic


# --- activation checkpointing ---


class Activations(NamedTuple):
    """Of one micro-batch."""

    held: int
    """Bytes alive after the forward pass and not before it."""
    peak: int
    """The most bytes alive during the forward and the backward pass, less those before; gradients included."""
    seconds: float
    """Median of forward and backward."""


# train.activation_checkpointing, train.checkpoint_every
RECOMPUTED: Sequence[tuple[Recompute, int]] = (("none", 1), ("selective", 1), ("full", 2), ("full", 1))


def activations(config: RunConfig, device: torch.device, rounds: int) -> dict[tuple[str, int], Activations]:
    """By (train.activation_checkpointing, train.checkpoint_every), for a dense model on one rank."""
    layers = DenseLayers(seed=config.seed, impl=config.train.impl)
    batch = micro_batches(config, 0, device, ragged=False)[0]
    models = {
        (recompute, every): initial(GPT(config.model, layers, None, recompute, every), config, device)
        for recompute, every in RECOMPUTED
    }
    held = {key: _activation_bytes(model, batch) for key, model in models.items()}
    seconds = step_seconds(models, batch, rounds)
    return {key: Activations(*held[key], seconds[key]) for key in models}


def _activation_bytes(model: GPT, batch: MicroBatch) -> tuple[int, int]:
    model(*batch).backward()  # what is allocated once
    model.zero_grad(set_to_none=True)
    with meter(batch.tokens.device) as memory:
        before = memory.live()
        memory.reset_peak()
        loss = model(*batch)
        held = memory.live() - before
        loss.backward()
        peak = memory.peak - before
    model.zero_grad(set_to_none=True)
    return held, peak


# --- the layouts that are compared ---


def data_layouts(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """Every engine that shards and every stage, over data-parallel ranks alone, by name."""
    parallel = ParallelConfig(timeout_seconds=config.parallel.timeout_seconds)
    for precision in ("fp32", "bf16"):
        for stage in range(4):
            if stage > 0 or precision == "fp32":
                train = replace(config.train, engine="deepspeed", precision=precision)
                layout = replace(config, train=train, parallel=replace(parallel, zero_stage=stage))
                yield f"ZeRO {stage}, {precision}", replace(layout, deepspeed={"zero_optimization": AS_IN_THEORY})
        for stage in (2, 3):
            train = replace(config.train, engine="fsdp", precision=precision)
            layout = replace(config, train=train, parallel=replace(parallel, zero_stage=stage), deepspeed={})
            yield f"FSDP2 as ZeRO {stage}, {precision}", layout


def tensor_layouts(config: RunConfig, world_size: int) -> Iterator[tuple[str, RunConfig]]:
    """Tensor parallelism over all ranks, and over pairs of them, without and with sequence parallelism, by name."""
    for tp in sorted({2, world_size}):
        for sequence_parallel in (False, True):
            parallel = ParallelConfig(
                tensor_parallel=tp, sequence_parallel=sequence_parallel, timeout_seconds=config.parallel.timeout_seconds
            )
            train = replace(config.train, engine="deepspeed", precision="fp32")
            name = (
                f"TP {tp}{' + SP' if sequence_parallel else ''}{f' x DP {world_size // tp}' if tp < world_size else ''}"
            )
            yield name, replace(config, train=train, parallel=parallel, deepspeed={})
