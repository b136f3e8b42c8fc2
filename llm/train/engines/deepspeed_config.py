"""Writes the DeepSpeed config of a run: the keys that Ingot sets, and the others that the user may set."""

from __future__ import annotations

import copy
import difflib
from typing import Any

from llm.config import RunConfig
from llm.errors import InputError, require
from llm.train.engines.shared import DynamicLossScale

# What to use -> instead of these keys, which Ingot sets or whose default the engine relies on.
_INSTEAD = {
    "train.global_batch_size": ["train_batch_size"],
    "train.micro_batch_size": ["train_micro_batch_size_per_gpu"],
    "train.global_batch_size and train.micro_batch_size": ["gradient_accumulation_steps"],
    "train.precision": ["fp16", "bf16", "bfloat16", "torch_autocast", "data_types"],
    "train.activation_checkpointing": ["activation_checkpointing"],
    "optim.grad_clip": ["gradient_clipping"],
    "optim.lr, optim.betas, optim.eps and optim.weight_decay": ["optimizer"],
    "optim.schedule, optim.warmup_steps and optim.min_lr": ["scheduler"],
    "parallel.zero_stage": ["zero_optimization.stage"],
    "parallel.tensor_parallel": ["tensor_parallel"],
    "parallel.offload": [
        "zero_optimization.cpu_offload", "zero_optimization.cpu_offload_param",
        "zero_optimization.offload_optimizer.device", "zero_optimization.offload_optimizer.nvme_path",
        "zero_optimization.offload_param.device", "zero_optimization.offload_param.nvme_path",
    ],
    "checkpoint.interval and checkpoint.keep_last": ["checkpoint"],
    "logging.tensorboard": ["tensorboard"],
    "nothing: any layout reads a checkpoint": ["zero_optimization.elastic_checkpoint"],
    "nothing: its groups would mix tensor-parallel ranks": ["zero_optimization.zero_hpz_partition_size"],
    "nothing: it needs DeepSpeed's own Adam, and Ingot's is torch's in every layout": [
        "zero_optimization.offload_optimizer.ratio", "zero_optimization.offload_optimizer.super_offload",
    ],
    "nothing: results must not depend on it": [
        "managed_gradient_accumulation", "communication_data_type", "seq_parallel_communication_data_type",
        "gradient_allreduce_op", "gradient_predivide_factor", "prescale_gradients",
        "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
        "zero_optimization.memory_efficient_linear", "zero_optimization.compute_grad_norm", "zero_optimization.zenflow",
        "zero_optimization.zero_quantized_weights", "zero_optimization.zero_quantized_nontrainable_weights",
        "zero_optimization.zero_quantized_gradients",
    ],
}  # fmt: skip
OWNED = {key: instead for instead, keys in _INSTEAD.items() for key in keys}

# Keys of the top level that pass through. DeepSpeed ignores those it does not know, so that a misspelt one must be
# refused here.
PASSED_THROUGH = (
    "aio", "comms_logger", "compile", "disable_allgather", "disable_python_gc", "dump_state", "flops_profiler",
    "log_level", "memory_breakdown", "steps_per_print", "timers", "wall_clock_breakdown", "zero_optimization",
)  # fmt: skip


def deepspeed_config(config: RunConfig, *, dp_size: int, device: str) -> dict[str, Any]:
    """The dict that `deepspeed.initialize(config=...)` takes.

    Raises:
        InputError: fp16 on a CPU, or a key of the `deepspeed` section that Ingot owns or that
            DeepSpeed would ignore, or that is for an offload which parallel.offload does not name.
    """
    train, stage = config.train, config.parallel.zero_stage
    require(
        train.precision != "fp16" or device != "cpu",
        "train.precision is fp16 and the device is a CPU, which DeepSpeed refuses; "
        "use train.precision=bf16 with parallel.zero_stage=1, or fp32",
    )
    _check_user_keys(config.deepspeed)
    generated = {
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.global_batch_size // (dp_size * train.micro_batch_size),
        # Under ZeRO 0 DeepSpeed neither reports the norm nor shares its clipping: there the engine clips.
        "gradient_clipping": config.optim.grad_clip if stage > 0 else 0.0,
        "zero_optimization": {
            "stage": stage,
            # The default replaces torch's linear in the whole process (ZeRO 3): gradients in bf16 are 1e-2 off.
            "memory_efficient_linear": False,
            **{part: {"device": "cpu"} for part in _offloaded(config)},
        },
        # Each alone leaves gradients 2e-3 to 4e-3 off in bf16, both together 4e-8.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # offloading keeps torch's AdamW
        "steps_per_print": 2**62,  # Ingot reports
        "wall_clock_breakdown": False,
        # It waits for the GPU before and after each micro-batch.
        "timers": {"throughput": {"enabled": False}},
        **_precision(train.precision),
    }
    return _merged(generated, config.deepspeed)


def _offloaded(config: RunConfig) -> tuple[str, ...]:
    """The keys of zero_optimization for what lives in the CPU's memory; the user's section may add to no others."""
    parts = {"none": (), "optimizer": ("offload_optimizer",), "all": ("offload_optimizer", "offload_param")}
    chosen = parts[config.parallel.offload]
    for part in parts["all"]:
        require(
            part in chosen or part not in config.deepspeed.get("zero_optimization", {}),
            f"deepspeed.zero_optimization.{part} has no effect with parallel.offload {config.parallel.offload}; "
            f"use parallel.offload={'optimizer' if part == 'offload_optimizer' else 'all'}",
        )
    return chosen


def _precision(precision: str) -> dict[str, Any]:
    if precision != "fp16":
        return {"bf16": {"enabled": True}} if precision == "bf16" else {}
    scaling = DynamicLossScale()
    return {
        "fp16": {
            "enabled": True,
            "loss_scale": 0,  # dynamic
            "initial_scale_power": int(scaling.scale).bit_length() - 1,
            "loss_scale_window": scaling.window,
            "hysteresis": scaling.hysteresis,
            "consecutive_hysteresis": False,
            "min_loss_scale": int(scaling.minimum),
        }
    }


def _check_user_keys(section: dict[str, Any], prefix: str = "") -> None:
    for key, value in section.items():
        path = prefix + key
        if path in OWNED:
            raise InputError(f"deepspeed.{path} is set by Ingot; use {OWNED[path]}")
        if not prefix and key not in PASSED_THROUGH:
            near = difflib.get_close_matches(key, [*PASSED_THROUGH, *OWNED], n=1, cutoff=0.0)[0]
            instead = OWNED.get(near, f"deepspeed.{near}")
            found = f"deepspeed.{key} is not a key that Ingot passes on"
            raise InputError(f"{found}; the nearest is {near!r}: use {instead}")
        if path == "zero_optimization":
            require(isinstance(value, dict), f"deepspeed.{path} is {value!r}; expected keys and values")
        if isinstance(value, dict):
            _check_user_keys(value, f"{path}.")


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`, joined key by key where both hold a dict."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if both else copy.deepcopy(value)
    return result
