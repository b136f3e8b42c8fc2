"""The LSTM under every layout that it has, beside one plain process."""

from __future__ import annotations

from typing import Any

import pytest

from chosen import slow_but
from matrix import verified
from pool import RankPool
from tiny_run import case

pytestmark = pytest.mark.ranks

MODEL: dict[str, Any] = dict(family="lstm", n_head=4, n_kv_head=None, position="learned", dropout=0.1)
LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": dict(train=dict(engine="plain")),
    "zero0": dict(),
    "zero1-bf16": dict(parallel=dict(zero_stage=1), train=dict(precision="bf16")),
    "zero2": dict(parallel=dict(zero_stage=2), train=dict(z_loss=1e-3)),
    "fsdp2": dict(parallel=dict(zero_stage=2), train=dict(engine="fsdp")),
    "fsdp3-bf16": dict(parallel=dict(zero_stage=3), train=dict(engine="fsdp", precision="bf16")),
}


@pytest.mark.parametrize("name", slow_but(["zero2"], LAYOUTS))
def test_no_layout_changes_the_result(name: str, two_ranks: RankPool) -> None:
    reports = two_ranks.run(verified, case(model=MODEL, **LAYOUTS[name]))
    assert reports[0].failures == []
    assert all(report.passed for report in reports)
    owners = {check.name.split(".")[-2] for check in reports[0].checks if check.name}
    assert owners == {"embedding", "input", "recurrent"}
