"""Chooses the layers that a rank builds its model of."""

from __future__ import annotations

from typing import Any

from llm.config import RunConfig
from llm.model.forms import Forms
from llm.model.layers import DenseLayers
from llm.model.lora import LoRALayers
from llm.parallel.collectives import UNTIMED, Waits
from llm.parallel.fp8 import FP8, FP8Layers, TensorParallelFP8Layers
from llm.parallel.layers import TensorParallel, TensorParallelLayers
from llm.parallel.lora import TensorParallelLoRALayers
from llm.parallel.mesh import Mesh


def choose_layers(
    config: RunConfig, mesh: Mesh | None, forms: Forms | None = None, waits: Waits = UNTIMED
) -> DenseLayers:
    """The dense factory on one tensor-parallel rank (or without a mesh), else Megatron's, which waits in `waits`.

    With lora.rank, that of LoRA; with train.fp8, that of linears in FP8. forms None: those of train.impl.
    """
    forms = forms or Forms.of(config.train.impl)
    options: dict[str, Any] = dict(seed=config.seed, forms=forms, z_loss=config.train.z_loss)
    lora, fp8 = config.lora if config.lora.rank else None, config.train.fp8 != "none"
    how = FP8(config.train.fp8 == "rowwise", config.train.fp8_weight_grad == "high")
    if mesh is None or mesh.tp_size == 1:
        if fp8:
            return FP8Layers(how, **options)
        return DenseLayers(**options) if lora is None else LoRALayers(lora, **options)
    tp = TensorParallel.of(mesh.tp_group, config.parallel.sequence_parallel, waits)
    if fp8:
        return TensorParallelFP8Layers(how, tp, **options)
    return TensorParallelLayers(tp, **options) if lora is None else TensorParallelLoRALayers(lora, tp, **options)
