"""Builds the model and the engine of a config on this rank."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llm.checkpoint.reader import CheckpointReader
from llm.config import RunConfig
from llm.model.build import Model, model_of
from llm.model.forms import Forms
from llm.model.init import InitialWeights, give_memory
from llm.model.lora import freeze
from llm.parallel.collectives import UNTIMED, Waits
from llm.parallel.mesh import Mesh
from llm.parallel.parallelize import choose_layers
from llm.train.engines.base import Engine, WeightSource
from llm.train.stragglers import Stopwatch


def build_model(
    config: RunConfig, mesh: Mesh | None, forms: Forms | None = None, waits: Waits = UNTIMED, labels: int | None = None
) -> Model:
    """This rank's slices of the model, fp32 on the CPU, with their initial weights (on the meta device: none).

    waits: a context of the waits for tensor-parallel ranks. labels: how many a classifier tells apart; None: a language
    model.
    """
    recompute, every = config.train.activation_checkpointing, config.train.checkpoint_every
    layers = choose_layers(config, mesh, forms, waits)
    model = model_of(config.model, layers, recompute, every, labels)
    if config.lora.rank:
        freeze(model)
        if labels is not None:  # nothing has trained the head
            model.head.requires_grad_()
    return model


def build_engine(
    config: RunConfig,
    mesh: Mesh,
    device: torch.device,
    source: WeightSource | None = None,
    forms: Forms | None = None,
    build: Callable[[RunConfig, Mesh | None, Forms | None, Waits], Model] = build_model,
) -> Engine:
    """The engine of the config, in the state of a checkpoint, or new on other weights (None: initial). Collective.

    build: builds the model, as build_model does.
    """
    compiles = config.train.compile == "blocks"
    waits = UNTIMED if compiles else Stopwatch(device, running=False)  # no clock is read within a graph
    with torch.device("meta"):  # load_pieces fills the weights: they are drawn, or read, once
        model = build(config, mesh, forms, waits)
    # Engines that give each rank a part of every weight take them without memory, so that the model never exists whole.
    if config.train.engine == "plain" or (config.train.engine == "deepspeed" and config.parallel.zero_stage < 3):
        for parameter in model.parameters():
            give_memory(parameter, "cpu")
    # Imported here so that only runs that use DeepSpeed pay for it, or need it installed.
    if config.train.engine == "plain":
        from llm.train.engines.plain import PlainEngine as Kind
    elif config.train.engine == "fsdp":
        from llm.train.engines.fsdp import FSDPEngine as Kind
    else:
        from llm.train.engines.deepspeed import DeepSpeedEngine as Kind
    engine = Kind(config, model, mesh, device)
    if compiles:
        from llm.train.compiled import CompiledBlocks

        engine.compiled = CompiledBlocks.of(config, model)
    if mesh.tp_size > 1 and isinstance(waits, Stopwatch):
        engine.waits["tp"] = waits
    if isinstance(source, CheckpointReader):
        engine.load_scalar_state(source.state["engine"])
        engine.load_pieces(source, source.state["engine"]["optimizer_step"])
    else:
        engine.load_pieces(source or InitialWeights(config.model, config.seed), 0)
    return engine
