"""Checks what must hold between sections of a run's config (llm/config/run.py), and between a run and its world."""

from __future__ import annotations

from typing import Any

from llm.config.phases import Phase
from llm.config.sections import ModelConfig, ParallelConfig, TrainConfig
from llm.errors import InputError, require


def check_world(parallel: ParallelConfig, micro_batch_size: int, phases: tuple[Phase, ...], world_size: int) -> None:
    """Check that `world_size` ranks can share this run's layers and batch.

    The data-parallel size is world_size / tensor_parallel; each of those ranks takes
    global_batch_size / dp samples of a step, in micro-batches of micro_batch_size.

    Raises:
        InputError: with the numbers and the nearest valid choice.
    """
    tp = parallel.tensor_parallel
    divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
    require(
        world_size % tp == 0,
        f"the world of {world_size} ranks is not a multiple of parallel.tensor_parallel {tp}; "
        f"use parallel.tensor_parallel={min(divisors, key=lambda n: abs(n - tp))}",
    )
    dp = world_size // tp
    for phase in phases:
        _check_batch(phase.global_batch_size, micro_batch_size, dp)


def _check_batch(batch: int, micro: int, dp: int) -> None:
    if batch % (dp * micro) == 0:
        return
    if batch % dp == 0:
        fitting = [n for n in range(1, batch // dp + 1) if batch // dp % n == 0]
        advice = f"train.micro_batch_size={min(fitting, key=lambda n: abs(n - micro))}"
    else:
        advice = f"train.global_batch_size={max(1, round(batch / (dp * micro))) * dp * micro}"
    raise InputError(
        f"train.global_batch_size {batch} is not a multiple of {dp} data-parallel ranks x "
        f"train.micro_batch_size {micro} = {dp * micro}; use {advice}"
    )


def check_engine(train: TrainConfig, parallel: ParallelConfig, deepspeed: dict[str, Any]) -> None:
    """Refuse layouts that the engine does not have."""
    engine, precision = train.engine, train.precision
    stage, offload = parallel.zero_stage, parallel.offload
    found = f"found parallel.zero_stage {stage}"
    if engine == "plain":
        require(
            stage == 0, f"train.engine plain has no ZeRO; {found}, use parallel.zero_stage=0 or train.engine=deepspeed"
        )
        require(
            parallel.tensor_parallel == 1,
            "train.engine plain has no tensor parallelism; found parallel.tensor_parallel "
            f"{parallel.tensor_parallel}, use parallel.tensor_parallel=1 or train.engine=deepspeed",
        )
    elif engine == "fsdp":
        require(
            stage in (2, 3),
            f"train.engine fsdp shards parameters; {found}, use parallel.zero_stage=3, or 2 to keep them gathered "
            "between the forward and the backward pass",
        )
    else:
        require(
            precision == "fp32" or stage > 0,
            f"train.precision {precision} with parallel.zero_stage 0: DeepSpeed would "
            f"accumulate gradients in {precision}; use parallel.zero_stage=1",
        )
    require(
        engine == "deepspeed" or not deepspeed,
        f"train.engine {engine} reads nothing of the deepspeed section; found {', '.join(deepspeed)}: remove it",
    )
    needed = {"none": 0, "optimizer": 1, "all": 3}[offload]
    require(stage >= needed, f"parallel.offload {offload} needs parallel.zero_stage {needed} or more; found {stage}")
    require(
        engine != "fsdp" or offload != "optimizer",
        "train.engine fsdp offloads parameters with the optimizer's state; use parallel.offload=all",
    )


def check_phases(model: ModelConfig, phases: tuple[Phase, ...]) -> None:
    """Refuse sequences that the model has no positions for."""
    longest = max(phase.seq_len for phase in phases)
    require(longest <= model.max_seq_len, f"data.seq_len {longest} is above model.max_seq_len {model.max_seq_len}")


def check_sequence_parallel(parallel: ParallelConfig, phases: tuple[Phase, ...]) -> None:
    """Refuse sequences that tensor-parallel ranks cannot share evenly."""
    tp = parallel.tensor_parallel
    if not parallel.sequence_parallel:
        return
    require(tp > 1, "parallel.sequence_parallel needs parallel.tensor_parallel of 2 or more; found 1")
    for seq_len in (phase.seq_len for phase in phases):
        require(
            seq_len % tp == 0,
            f"data.seq_len {seq_len} is not a multiple of parallel.tensor_parallel {tp}, which "
            f"parallel.sequence_parallel needs; use data.seq_len={max(tp, seq_len // tp * tp)}",
        )


def check_tensor_parallel(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Refuse a degree that does not cut heads and feed-forward width into equal parts."""
    tp = parallel.tensor_parallel
    require(
        tp <= model.kv_heads,
        f"TP degree above the key/value heads: parallel.tensor_parallel is {tp}, model.n_kv_head "
        f"is {model.kv_heads}; use parallel.tensor_parallel={model.kv_heads} or less",
    )
    widths = {"n_kv_head": model.kv_heads, "n_head": model.n_head, "d_ff": model.ff_dim}
    valid = [n for n in range(1, tp + 1) if all(width % n == 0 for width in widths.values())]
    for name, width in widths.items():
        require(
            width % tp == 0,
            f"model.{name} {width} is not a multiple of parallel.tensor_parallel {tp}; "
            f"use parallel.tensor_parallel={valid[-1]}",
        )
