"""The mesh: all ranks as a grid of pipeline, data, context and tensor parallel ranks.

Tensor parallelism varies fastest, so its ranks share a node. `pp` and `cp` have size 1 until they are built.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llm.config import ParallelConfig


@dataclass(frozen=True)
class Mesh:
    """The grid seen from one process."""

    devices: DeviceMesh
    rank: int
    world_size: int
    dp_group: dist.ProcessGroup
    dp_rank: int
    dp_size: int
    tp_group: dist.ProcessGroup
    tp_rank: int
    tp_size: int

    @staticmethod
    def create(config: ParallelConfig, device_type: str) -> Mesh:
        """Lay the grid over the initialised default process group; device_type "cpu" or "cuda".

        The world must divide by the tensor-parallel degree (check_world says so to users). Collective.
        """
        world, tp = dist.get_world_size(), config.tensor_parallel
        assert world % tp == 0, f"{world} ranks in groups of {tp}"
        shape = (1, world // tp, 1, tp)
        devices = init_device_mesh(device_type, shape, mesh_dim_names=("pp", "dp", "cp", "tp"))
        dp_group, tp_group = devices.get_group("dp"), devices.get_group("tp")
        dp_rank, tp_rank = devices.get_local_rank("dp"), devices.get_local_rank("tp")
        return Mesh(devices, dist.get_rank(), world, dp_group, dp_rank, world // tp, tp_group, tp_rank, tp)
