"""Checks what must hold between sections of a run's config (llm/config/run.py), and between a run and its world."""

from __future__ import annotations

from typing import Any

from llm.config.finetune import FinetuneConfig
from llm.config.lora import LoRAConfig
from llm.config.phases import Phase
from llm.config.reports import ProfileConfig
from llm.config.sections import DataConfig, ModelConfig, OptimConfig, ParallelConfig, TrainConfig
from llm.errors import InputError, require


def check_world(parallel: ParallelConfig, micro_batch_size: int, phases: tuple[Phase, ...], world_size: int) -> None:
    """Refuse a world that cannot share this run's layers and batch, with the nearest valid choice.

    Each of dp = world_size / tensor_parallel data-parallel ranks takes global_batch_size / dp samples of a step, in
    micro-batches of micro_batch_size.
    """
    tp, micro = parallel.tensor_parallel, micro_batch_size
    require(
        world_size % tp == 0,
        f"the world of {world_size} ranks is not a multiple of parallel.tensor_parallel {tp}; "
        f"use parallel.tensor_parallel={_nearest_divisor(world_size, tp)}",
    )
    dp = world_size // tp
    for batch in (phase.global_batch_size for phase in phases):
        if batch % (dp * micro) == 0:
            continue
        advice = f"train.global_batch_size={max(1, round(batch / (dp * micro))) * dp * micro}"
        if batch % dp == 0:
            advice = f"train.micro_batch_size={_nearest_divisor(batch // dp, micro)}"
        raise InputError(
            f"train.global_batch_size {batch} is not a multiple of {dp} data-parallel ranks x "
            f"train.micro_batch_size {micro} = {dp * micro}; use {advice}"
        )


def _nearest_divisor(number: int, wanted: int) -> int:
    return min((n for n in range(1, number + 1) if number % n == 0), key=lambda n: abs(n - wanted))


def check_engine(train: TrainConfig, parallel: ParallelConfig, deepspeed: dict[str, Any]) -> None:
    """Refuse layouts that the engine does not have."""
    engine, precision, tp = train.engine, train.precision, parallel.tensor_parallel
    stage, offload = parallel.zero_stage, parallel.offload
    found = f"found parallel.zero_stage {stage}"
    require(
        engine != "plain" or stage == 0,
        f"train.engine plain has no ZeRO; {found}, use parallel.zero_stage=0 or train.engine=deepspeed",
    )
    require(
        engine != "plain" or tp == 1,
        f"train.engine plain has no tensor parallelism; found parallel.tensor_parallel {tp}, use "
        "parallel.tensor_parallel=1 or train.engine=deepspeed",
    )
    require(
        engine != "fsdp" or stage in (2, 3),
        f"train.engine fsdp shards parameters; {found}, use parallel.zero_stage=3, or 2 to keep them gathered between "
        "the forward and the backward pass",
    )
    require(
        engine != "deepspeed" or precision == "fp32" or stage > 0,
        f"train.precision {precision} with parallel.zero_stage 0: DeepSpeed would accumulate gradients in {precision}; "
        "use parallel.zero_stage=1",
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


def check_compile(train: TrainConfig, parallel: ParallelConfig, model: ModelConfig, profile: ProfileConfig) -> None:
    """Refuse compiled blocks where they would not be whole graphs, or where their parts must be told apart."""
    refused = {
        "parallel.zero_stage 3 of DeepSpeed, which gathers weights within a block; use train.engine=fsdp": (
            train.engine == "deepspeed" and parallel.zero_stage == 3
        ),
        "model.family lstm, which has no blocks of a transformer; use train.compile=none": model.family == "lstm",
        f"profile.steps {profile.steps}, which names the parts of a block; profile with train.compile=none": (
            profile.steps is not None
        ),
    }
    for found, given in refused.items():
        require(train.compile == "none" or not given, f"train.compile {train.compile} does not go with {found}")


def check_lora(lora: LoRAConfig, model: ModelConfig, train: TrainConfig) -> None:
    """Refuse to adapt an LSTM, or weights that nothing has trained."""
    require(
        lora.rank == 0 or model.family == "gpt",
        f"lora.rank is {lora.rank} and model.family {model.family}, which has none of lora.targets; use lora.rank=0",
    )
    require(
        lora.rank == 0 or train.init_from is not None,
        f"lora.rank is {lora.rank} and train.init_from null: LoRA keeps the weights, which would be random; set "
        "train.init_from to a run, a checkpoint or a Hugging Face folder",
    )


def check_muon(optim: OptimConfig, parallel: ParallelConfig, lora: LoRAConfig) -> None:
    """Refuse Muon where its matrices are not on the devices, or are not trained."""
    require(
        optim.name == "adamw" or parallel.offload == "none",
        f"optim.name muon multiplies matrices on the device; found parallel.offload {parallel.offload}, use "
        "parallel.offload=none or optim.name=adamw",
    )
    require(
        optim.name == "adamw" or lora.rank == 0,
        f"optim.name muon updates the matrices of the blocks, which lora.rank {lora.rank} keeps; use optim.name=adamw",
    )


def check_finetune(finetune: FinetuneConfig, data: DataConfig) -> None:
    """Refuse settings of token files for a task that reads examples from data.source alone."""
    if finetune.task in ("none", "continue"):
        return
    read = f"finetune.task {finetune.task} reads data.source"
    for name in ("path", "blend", "phases"):
        require(not getattr(data, name), f"{read} alone; found data.{name}: remove it")
    require(
        data.packing == "best_fit", f"{read} by whole examples; use data.packing=best_fit, data.document_masks=true"
    )


def check_lstm(model: ModelConfig, data: DataConfig, parallel: ParallelConfig, train: TrainConfig) -> None:
    """Refuse an LSTM under what only a transformer has."""
    refused = {
        f"parallel.tensor_parallel {parallel.tensor_parallel}: each position waits for the whole state before it; use "
        "parallel.tensor_parallel=1": parallel.tensor_parallel > 1,
        "parallel.zero_stage 3 of DeepSpeed, which gathers the weights of layers that are called one by one; use "
        "parallel.zero_stage=2, or train.engine=fsdp": train.engine == "deepspeed" and parallel.zero_stage == 3,
        "data.document_masks: its state runs on through a row; use data.document_masks=false": data.document_masks,
        f"train.activation_checkpointing {train.activation_checkpointing}; use train.activation_checkpointing=none": (
            train.activation_checkpointing != "none"
        ),
    }
    for found, given in refused.items():
        require(model.family != "lstm" or not given, f"model.family lstm does not go with {found}")


def check_fp8(
    model: ModelConfig, lora: LoRAConfig, parallel: ParallelConfig, train: TrainConfig, phases: tuple[Phase, ...]
) -> None:
    """Refuse products that a GPU does not have in FP8, on a CPU too, and what Ingot does not have with them."""
    if train.fp8 == "none":
        return
    found, instead = f"train.fp8 {train.fp8}", "or train.fp8=none"
    require(model.family == "gpt", f"{found} is of a transformer's blocks; found model.family lstm: use train.fp8=none")
    require(lora.rank == 0, f"{found} does not go with lora.rank {lora.rank}; use lora.rank=0, {instead}")
    require(
        train.fp8 != "rowwise" or train.precision == "bf16",
        f"{found} gives bf16; found train.precision {train.precision}: use train.precision=bf16, or "
        "train.fp8=tensorwise",
    )
    for name, side in fp8_sides(model, parallel.tensor_parallel).items():
        require(
            side % 16 == 0,
            f"{found} multiplies matrices with sides that are multiples of 16; {name} is {side}: change it, {instead}",
        )
    for tokens in (train.micro_batch_size * phase.seq_len for phase in phases):
        require(
            train.fp8_weight_grad == "high" or tokens % 16 == 0,
            f"{found} sums a weight's gradient over a multiple of 16 tokens; train.micro_batch_size times data.seq_len "
            f"is {tokens}: change it, or use train.fp8_weight_grad=high",
        )


def fp8_sides(model: ModelConfig, tp: int) -> dict[str, int]:
    """The sides of the matrices that each of `tp` ranks multiplies in FP8, by what makes them; tp divides them."""
    shared = f" / parallel.tensor_parallel {tp}" if tp > 1 else ""
    qkv = (model.n_head + 2 * model.kv_heads) * model.head_dim
    return {
        "model.d_model": model.d_model,
        f"model.d_model{shared}": model.d_model // tp,
        f"the width of queries, keys and values{shared}": qkv // tp,
        f"the width of the feed-forward layer, model.d_ff{shared}": model.ff_dim // tp,
    }


def check_tensor_parallel(model: ModelConfig, parallel: ParallelConfig, phases: tuple[Phase, ...]) -> None:
    """Refuse a degree that does not cut heads, feed-forward width and shared sequences into equal parts."""
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
    if parallel.sequence_parallel:
        require(tp > 1, "parallel.sequence_parallel needs parallel.tensor_parallel of 2 or more; found 1")
        for seq_len in (phase.seq_len for phase in phases):
            require(
                seq_len % tp == 0,
                f"data.seq_len {seq_len} is not a multiple of parallel.tensor_parallel {tp}, which "
                f"parallel.sequence_parallel needs; use data.seq_len={max(tp, seq_len // tp * tp)}",
            )
