"""The mesh: all ranks as a grid of pipeline, data, context and tensor parallel ranks.

Tensor parallelism varies fastest, so its ranks share a node. `pp` and `cp` have size 1 until they are built.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llm.config import ParallelConfig


@dataclass(frozen=True)
class Mesh:
    """The grid seen from one process."""

    devices: DeviceMesh

    @staticmethod
    def create(config: ParallelConfig, device_type: str) -> Mesh:
        """Lay the grid over the initialised default process group; device_type "cpu" or "cuda".

        The world must divide by the tensor-parallel degree (check_world says so to users). Collective.
        """
        world, tp = dist.get_world_size(), config.tensor_parallel
        assert world % tp == 0, f"{world} ranks in groups of {tp}"
        shape = (1, world // tp, 1, tp)
        return Mesh(init_device_mesh(device_type, shape, mesh_dim_names=("pp", "dp", "cp", "tp")))

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        return self.devices.size()

    @cached_property
    def dp_group(self) -> dist.ProcessGroup:
        return self.devices.get_group("dp")

    @cached_property
    def tp_group(self) -> dist.ProcessGroup:
        return self.devices.get_group("tp")

    @cached_property
    def dp_rank(self) -> int:
        return self.devices.get_local_rank("dp")

    @cached_property
    def tp_rank(self) -> int:
        return self.devices.get_local_rank("tp")

    @cached_property
    def dp_size(self) -> int:
        return self.devices.size(1)

    @cached_property
    def tp_size(self) -> int:
        return self.devices.size(3)
