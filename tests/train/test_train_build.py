"""The start of a run draws its weights once, on every engine: no layer draws any that are drawn over later."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from drawn import sizes_drawn
from llm.config import RunConfig
from llm.model.gpt import GPT
from llm.parallel.mesh import Mesh
from llm.train.build import build_engine
from pool import RankPool
from tiny_run import case

MODEL = dict(position="learned", tie_embeddings=False)
LAYOUTS = {
    "plain": case(model=MODEL, train=dict(engine="plain", precision="bf16")),
    "deepspeed": case(model=MODEL),
    "zero-1-bf16": case(model=MODEL, parallel=dict(zero_stage=1), train=dict(precision="bf16")),
    "zero-3": case(model=MODEL, parallel=dict(zero_stage=3)),
    "tensor-parallel": case(model=MODEL, parallel=dict(tensor_parallel=2)),
    "fsdp": case(model=MODEL, parallel=dict(zero_stage=3), train=dict(engine="fsdp")),
}


def drawn_at_start(config: RunConfig) -> list[int]:
    """The sizes of what this rank draws until the first step could be made."""
    mesh, engines = Mesh.create(config.parallel, "cpu"), []
    drawn = sizes_drawn(lambda: engines.append(build_engine(config, mesh, torch.device("cpu"))))
    engines[0].close()
    return drawn


@pytest.mark.parametrize("config", LAYOUTS.values(), ids=LAYOUTS)
def test_a_rank_draws_each_weight_at_most_once(config: RunConfig, two_ranks: RankPool) -> None:
    weights = Counter(p.numel() for p in GPT(config.model).parameters() if p.dim() == 2)
    ranks = [Counter(sizes) for sizes in two_ranks.run(drawn_at_start, config)]
    assert all(drawn <= weights for drawn in ranks), "a weight was drawn twice, or something else was drawn"
    assert not weights - (ranks[0] + ranks[1]), "a weight was not drawn"
