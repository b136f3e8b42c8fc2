"""Chooses the layers that a rank builds its model of."""

from __future__ import annotations

from llm.config import RunConfig
from llm.model.forms import Forms
from llm.model.layers import DenseLayers
from llm.parallel.collectives import UNTIMED, Waits
from llm.parallel.layers import TensorParallel, TensorParallelLayers
from llm.parallel.mesh import Mesh


def choose_layers(
    config: RunConfig, mesh: Mesh | None, forms: Forms | None = None, waits: Waits = UNTIMED
) -> DenseLayers:
    """The dense factory on one tensor-parallel rank (or without a mesh), else Megatron's, which waits in `waits`.

    forms None: those of train.impl.
    """
    forms = forms or Forms.of(config.train.impl)
    if mesh is None or mesh.tp_size == 1:
        return DenseLayers(seed=config.seed, forms=forms, z_loss=config.train.z_loss)
    tp = TensorParallel.of(mesh.tp_group, config.parallel.sequence_parallel, waits)
    return TensorParallelLayers(tp, seed=config.seed, forms=forms, z_loss=config.train.z_loss)
