"""Chooses the layers that a rank builds its model of."""

from __future__ import annotations

from llm.config import RunConfig
from llm.model.layers import DenseLayers
from llm.parallel.layers import TensorParallel, TensorParallelLayers
from llm.parallel.mesh import Mesh


def choose_layers(config: RunConfig, mesh: Mesh | None) -> DenseLayers:
    """The dense factory on one tensor-parallel rank (or without a mesh), Megatron's on several."""
    if mesh is None or mesh.tp_size == 1:
        return DenseLayers(seed=config.seed, impl=config.train.impl, z_loss=config.train.z_loss)
    tp = TensorParallel.of(mesh.tp_group, config.parallel.sequence_parallel)
    return TensorParallelLayers(tp, seed=config.seed, impl=config.train.impl, z_loss=config.train.z_loss)
