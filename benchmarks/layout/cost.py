"""What a layout costs, measured on this machine: time of the parallel layers, memory, bytes sent.

Batches are random tokens: nothing measured here depends on the text. Every function is collective where it takes a
mesh; its result is this rank's.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch

from benchmarks.layout.counters import LiveStorages, Traffic
from llm.config import ParallelConfig, RunConfig
from llm.model.gpt import GPT
from llm.model.init import init_weights
from llm.model.layers import DenseLayers
from llm.parallel.layers import TensorParallel, TensorParallelLayers
from llm.parallel.mesh import Mesh
from llm.plan.traffic import parameters, weight_bytes
from llm.train.build import build_engine
from llm.train.engines.base import DTYPES, MicroBatch

FP32 = 4
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


def micro_batches(config: RunConfig, mesh: Mesh | None, device: torch.device, step: int = 0) -> list[MicroBatch]:
    """This rank's micro-batches of a step, of random tokens."""
    dp_rank, dp_size = (mesh.dp_rank, mesh.dp_size) if mesh is not None else (0, 1)
    size, length = config.train.micro_batch_size, config.data.seq_len
    count = config.train.global_batch_size // (dp_size * size)
    positions = torch.arange(length, device=device)
    batches = []
    for i in range(count):
        first = step * config.train.global_batch_size + (dp_rank * count + i) * size
        generator = torch.Generator().manual_seed(first)
        tokens = torch.randint(config.model.vocab_size, (size, length + 1), generator=generator).to(device)
        samples = torch.arange(first, first + size, device=device)
        batches.append(MicroBatch(tokens[:, :-1], positions, samples, tokens[:, 1:]))
    return batches


def target_count(config: RunConfig) -> int:
    return config.train.global_batch_size * config.data.seq_len


# --- the parallel layers on one tensor-parallel rank, beside plain ones ---


def seconds_of_step(model: GPT, batch: MicroBatch) -> float:
    """Of a forward and a backward pass."""
    model.zero_grad(set_to_none=True)
    _synchronise(batch.tokens.device)
    began = time.perf_counter()
    model(*batch).backward()
    _synchronise(batch.tokens.device)
    return time.perf_counter() - began


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def layer_times(config: RunConfig, mesh: Mesh, device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds of forward and backward with nn.Linear and with the parallel layers at a degree of 1, in turns.

    `mesh`: of tensor-parallel groups of one rank. The medians of `rounds` rounds, the first two not counted.
    """
    assert mesh.tp_size == 1, f"{mesh.tp_size} tensor-parallel ranks; expected 1"
    factories = {
        "nn.Linear": DenseLayers(seed=config.seed, impl=config.train.impl),
        "parallel layers, TP 1": TensorParallelLayers(
            TensorParallel.of(mesh.tp_group), seed=config.seed, impl=config.train.impl
        ),
    }
    models = {}
    for name, factory in factories.items():
        models[name] = GPT(config.model, factory)
        init_weights(models[name], config.model, config.seed)
        models[name].to(device=device, dtype=DTYPES[config.train.precision])
    batch = micro_batches(config, mesh, device)[0]
    times: dict[str, list[float]] = {name: [] for name in models}
    for i in range(rounds + 2):
        for name in list(models)[:: 1 if i % 2 else -1]:
            times[name].append(seconds_of_step(models[name], batch))
    return {name: statistics.median(seconds[2:]) for name, seconds in times.items()}


# --- memory of the training state ---


class State(NamedTuple):
    """Bytes of training state on one rank."""

    weights: int
    """Parameters and, where they are other tensors, fp32 masters."""
    moments: int
    """Adam's two."""
    gradients: int
    """What is alive between the backward pass and the step and not after it."""


def state_memory(config: RunConfig, mesh: Mesh, device: torch.device) -> State:
    """Measured over the second step: the first one allocates what stays."""
    with LiveStorages(existing=False) as memory:  # earlier engines, full of cycles, may be freed meanwhile
        engine = build_engine(config, mesh, device)
        engine.set_lr(config.optim.lr)
        alive = [_settled(memory)]
        for step in range(2):
            engine.forward_backward(micro_batches(config, mesh, device, step), target_count(config))
            alive.append(_settled(memory))
            engine.step()
            alive.append(_settled(memory))
        engine.close()
    built, between, after = alive[0], alive[-2], alive[-1]
    return State(built, after - built, between - after)


def _settled(memory: LiveStorages) -> int:
    """Bytes that live once nothing more is freed: a backward pass's threads may let go of its last tensors after it."""
    before, now = -1, memory.live()
    while before != now:
        gc.collect()
        time.sleep(0.02)
        before, now = now, memory.live()
    return now


def state_theory(config: RunConfig, world_size: int) -> State:
    """Rajbhandari et al. 2020, section 3.1 and figure 1, as Ingot sets DeepSpeed up: gradients are kept in fp32.

    For N parameters on a tensor-parallel rank, w bytes each (fp32 4, bf16 and fp16 2), d data-parallel ranks:

        stage   weights          moments   gradients
        0       w N              8 N       4 N
        1       w N + 4 N / d    8 N / d   4 N
        2       w N + 4 N / d    8 N / d   4 N / d
        3       (w + 4) N / d    8 N / d   4 N / d

    FSDP2 has 4 N / d of weights at either stage: the masters' shards are the parameters. What is measured differs:

    - DeepSpeed at stage 1 in fp32 frees, after the last micro-batch, what belongs to other ranks: 4 N / d are left.
    - at stage 1 in bf16 it allocates the 4 N for gradients when it is built (they count as weights here), and keeps the
      last micro-batch's in bf16 beside them: 2 N.
    - at stage 3 it allocates the 4 N / d for gradients, and a bucket of reduce_bucket_size elements, when it is built.
    - at stages 1 and 2 in fp32 a parameter that the parts of two ranks share keeps its whole gradient on both.
    """
    tp, stage = config.parallel.tensor_parallel, config.parallel.zero_stage
    n, w, d = parameters(config.model, tp), weight_bytes(config), world_size // tp
    masters = FP32 * n // d
    if config.train.engine == "fsdp":
        return State(masters, 2 * masters, masters)
    if stage == 0:
        return State(w * n + (0 if w == FP32 else FP32 * n), 2 * FP32 * n, FP32 * n)
    weights = w * n // d if stage == 3 else w * n
    return State(weights + masters, 2 * masters, FP32 * n if stage == 1 else masters)


# --- bytes sent ---


def step_traffic(config: RunConfig, mesh: Mesh, device: torch.device) -> Traffic:
    """Of the second step: DeepSpeed's ZeRO 3 traces the first one."""
    engine = build_engine(config, mesh, device)
    engine.set_lr(config.optim.lr)
    for step, traffic in enumerate((Traffic(), Traffic())):
        with traffic:
            engine.forward_backward(micro_batches(config, mesh, device, step), target_count(config))
            engine.step()
    engine.close()
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
RECOMPUTED: Sequence[tuple[str, int]] = (("none", 1), ("selective", 1), ("full", 2), ("full", 1))


def activations(config: RunConfig, device: torch.device, rounds: int) -> dict[tuple[str, int], Activations]:
    """By (train.activation_checkpointing, train.checkpoint_every), for a dense model on one rank; timed in turns."""
    models, batch = {}, micro_batches(config, None, device)[0]
    for recompute, every in RECOMPUTED:
        model = GPT(config.model, DenseLayers(seed=config.seed, impl=config.train.impl), None, recompute, every)  # pyright: ignore[reportArgumentType]
        init_weights(model, config.model, config.seed)
        models[recompute, every] = model.to(device=device, dtype=DTYPES[config.train.precision])
    held = {key: _activation_bytes(model, batch) for key, model in models.items()}
    times: dict[tuple[str, int], list[float]] = {key: [] for key in models}
    for _ in range(rounds + 2):
        for key, model in models.items():
            times[key].append(seconds_of_step(model, batch))
    return {key: Activations(*held[key], statistics.median(times[key][2:])) for key in models}


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
