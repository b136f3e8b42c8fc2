"""`verify` of blocks that Inductor has compiled: the same bounds, though they round less often."""

from __future__ import annotations

from typing import Any

import pytest

from matrix import FAMILIES, verified
from pool import RankPool
from tiny_run import case

pytestmark = [pytest.mark.slow, pytest.mark.ranks]

LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": dict(train=dict(engine="plain")),
    "zero2-full": dict(parallel=dict(zero_stage=2), train=dict(activation_checkpointing="full")),
    "tp2-sp-fsdp3-selective": dict(
        parallel=dict(tensor_parallel=2, sequence_parallel=True, zero_stage=3),
        train=dict(engine="fsdp", activation_checkpointing="selective"),
        data=dict(document_masks=True),
    ),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inductor_is_within_the_bounds(layout: str, family: str, precision: str, two_ranks: RankPool) -> None:
    sections = LAYOUTS[layout]
    train = dict(sections["train"], precision=precision, compile="blocks")
    model = dict(dropout=0.1, **FAMILIES[family])
    reports = two_ranks.run(verified, case(**dict(sections, train=train, model=model)), 2, "inductor")
    assert reports[0].failures == []
    assert all(report.passed for report in reports)
