"""From a config to a model and an engine on this rank."""

from __future__ import annotations

import torch

from kernels.dispatch import KernelError, choose
from llm.config import InputError, RunConfig
from llm.model.gpt import GPT
from llm.model.init import init_weights
from llm.parallel.mesh import Mesh
from llm.parallel.parallelize import choose_layers
from llm.train.engines.base import DTYPES, Engine


def check_kernels(config: RunConfig, device: torch.device) -> str:
    """Say which form each kernel will take; InputError if one that the config asks for cannot run there."""
    model, dtype = config.model, DTYPES[config.train.precision]
    places = {"attention": (model.head_dim, model.dropout)}
    if model.norm == "layernorm":
        places["layer_norm"] = (model.d_model, 0.0)
    try:
        chosen = {
            op: choose(config.train.impl, op, device=device, dtype=dtype, width=width, dropout=dropout)
            for op, (width, dropout) in places.items()
        }
    except KernelError as error:
        raise InputError(f"train.impl: {error}") from error
    return ", ".join(f"{op}: {form}" for op, form in chosen.items())


def build_model(config: RunConfig, mesh: Mesh | None) -> GPT:
    """The model with its initial weights, fp32 on the CPU: this rank's slices of them."""
    recompute = config.train.activation_checkpointing == "full"
    model = GPT(config.model, choose_layers(config, mesh), recompute=recompute)
    init_weights(model, config.model, config.seed)
    return model


def build_engine(config: RunConfig, model: GPT, mesh: Mesh, device: torch.device) -> Engine:
    """Hand the model to the engine that the config names. Collective."""
    if config.train.engine == "plain":
        from llm.train.engines.plain import PlainEngine

        return PlainEngine(config, model, mesh, device)
    # Imported here so that only runs that use DeepSpeed pay for it, or need it installed.
    from llm.train.engines.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(config, model, mesh, device)
