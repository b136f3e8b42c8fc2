"""Every rank begins as many collectives in a step, under each engine: by that the heartbeat tells who is behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from chosen import slow_but
from llm.config import RunConfig
from llm.parallel.mesh import Mesh
from llm.train.build import build_engine
from pool import RankPool
from tiny_run import case, trajectory

CASES = [("plain", 0, 1), ("fsdp", 3, 2), ("deepspeed", 0, 2), ("deepspeed", 1, 2), ("deepspeed", 3, 2)]


def collectives(config: RunConfig) -> list[int]:
    """How many this rank begins in each of two steps with a validation, and in gathering what it saves."""
    mesh = Mesh.create(config.parallel, "cpu")
    groups: list[Any] = [dist.group.WORLD, mesh.dp_group, mesh.tp_group]
    engine, counts = build_engine(config, mesh, torch.device("cpu")), []
    for part in ("step", "step", "save"):
        before = sum(group._get_sequence_number_for_group() for group in groups)
        if part == "step":
            trajectory(engine, config, mesh.dp_rank, mesh.dp_size, 1, ragged=True)
        else:
            list(engine.state_pieces())
        counts.append(sum(group._get_sequence_number_for_group() for group in groups) - before)
    engine.close()
    return counts


@pytest.mark.parametrize("layout", slow_but(CASES[:2], CASES))
def test_all_ranks_begin_as_many_collectives(layout: tuple[str, int, int], four_ranks: RankPool) -> None:
    engine, stage, tp = layout
    parallel, train = dict(zero_stage=stage, tensor_parallel=tp), dict(engine=engine)
    first, *others = four_ranks.run(collectives, case(parallel=parallel, train=train))
    assert others == [first] * 3
    assert first[0] > 0 and first[1] > 0 and first[2] == 0
