"""Writes the DeepSpeed config of a run: the keys that Ingot sets, and the others that the user may set."""

from __future__ import annotations

import copy
import difflib
from typing import Any, Literal

from llm.config import RunConfig
from llm.errors import InputError, require
from llm.train.engines.shared import DynamicLossScale

_PRECISION = "train.precision"
_NOT_SET_HERE = "nothing: results must not depend on it"
_OFFLOAD = "parallel.offload"
_OTHER_ADAM = "nothing: it needs DeepSpeed's own Adam, and Ingot's is torch's in every layout"

# Keys that Ingot sets or whose default the engine relies on -> what to use instead.
OWNED = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "managed_gradient_accumulation": _NOT_SET_HERE,
    "gradient_clipping": "optim.grad_clip",
    "optimizer": "optim.lr, optim.betas, optim.eps and optim.weight_decay",
    "scheduler": "optim.schedule, optim.warmup_steps and optim.min_lr",
    "zero_optimization.stage": "parallel.zero_stage",
    "zero_optimization.memory_efficient_linear": _NOT_SET_HERE,
    "zero_optimization.compute_grad_norm": _NOT_SET_HERE,
    "zero_optimization.elastic_checkpoint": "nothing: any layout reads a checkpoint",
    "zero_optimization.cpu_offload": _OFFLOAD,
    "zero_optimization.cpu_offload_param": _OFFLOAD,
    "zero_optimization.offload_optimizer.device": _OFFLOAD,
    "zero_optimization.offload_optimizer.nvme_path": _OFFLOAD,
    "zero_optimization.offload_optimizer.ratio": _OTHER_ADAM,
    "zero_optimization.offload_optimizer.super_offload": _OTHER_ADAM,
    "zero_optimization.offload_param.device": _OFFLOAD,
    "zero_optimization.offload_param.nvme_path": _OFFLOAD,
    "zero_optimization.zenflow": _NOT_SET_HERE,
    "zero_optimization.zero_quantized_weights": _NOT_SET_HERE,
    "zero_optimization.zero_quantized_nontrainable_weights": _NOT_SET_HERE,
    "zero_optimization.zero_quantized_gradients": _NOT_SET_HERE,
    "zero_optimization.zero_hpz_partition_size": "nothing: its groups would mix tensor-parallel ranks",
    "zero_allow_untested_optimizer": _NOT_SET_HERE,
    "zero_force_ds_cpu_optimizer": _NOT_SET_HERE,
    "fp16": _PRECISION,
    "bf16": _PRECISION,
    "bfloat16": _PRECISION,
    "torch_autocast": _PRECISION,
    "data_types": _PRECISION,
    "communication_data_type": _NOT_SET_HERE,
    "seq_parallel_communication_data_type": _NOT_SET_HERE,
    "gradient_allreduce_op": _NOT_SET_HERE,
    "gradient_predivide_factor": _NOT_SET_HERE,
    "prescale_gradients": _NOT_SET_HERE,
    "tensor_parallel": "parallel.tensor_parallel",
    "activation_checkpointing": "train.activation_checkpointing",
    "checkpoint": "checkpoint.interval and checkpoint.keep_last",
    "tensorboard": "logging.tensorboard",
}

# Keys of the top level that pass through. DeepSpeed ignores those it does not know, so that a
# misspelt one must be refused here.
PASSED_THROUGH = (
    "aio",
    "comms_logger",
    "compile",
    "disable_allgather",
    "disable_python_gc",
    "dump_state",
    "flops_profiler",
    "log_level",
    "memory_breakdown",
    "steps_per_print",
    "timers",
    "wall_clock_breakdown",
    "zero_optimization",
)


def deepspeed_config(config: RunConfig, *, dp_size: int, device: Literal["cpu", "cuda"] | str) -> dict[str, Any]:
    """The dict that `deepspeed.initialize(config=...)` takes. Pure: imports and changes nothing.

    Under ZeRO 0 DeepSpeed neither reports the gradient norm nor shares its clipping with Ingot's,
    so the engine clips there and `gradient_clipping` is 0.

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
    offloaded = _offloaded(config)
    generated = {
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.global_batch_size // (dp_size * train.micro_batch_size),
        "gradient_clipping": config.optim.grad_clip if stage > 0 else 0.0,
        "zero_optimization": {
            "stage": stage,
            # The default replaces torch.nn.functional.linear in the whole process (ZeRO 3), with
            # gradients in bf16 that are 1e-2 off.
            "memory_efficient_linear": False,
            **{part: {"device": "cpu"} for part in offloaded},
        },
        # Each alone leaves gradients 2e-3 to 4e-3 off in bf16, both together 4e-8.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # offloading keeps torch's AdamW
        "steps_per_print": 2**62,  # Ingot reports
        "wall_clock_breakdown": False,
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
    if precision == "fp32":
        return {}
    if precision == "bf16":
        return {"bf16": {"enabled": True}}
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
            raise InputError(
                f"deepspeed.{key} is not a key that Ingot passes on; the nearest is {near!r}: use {instead}"
            )
        if path == "zero_optimization":
            require(
                isinstance(value, dict),
                f"deepspeed.zero_optimization is {value!r}; expected keys and values",
            )
        if isinstance(value, dict):
            _check_user_keys(value, f"{path}.")


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`, joined key by key where both hold a dict."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if both else copy.deepcopy(value)
    return result
