"""LoRA under every kind of layout is that of one process, and no bit of a weight that is not trained changes."""

from __future__ import annotations

import pytest

from chosen import slow_but
from matrix import verified
from pool import RankPool
from tiny_run import case

LORA = dict(rank=3, alpha=5.0)
BF16 = dict(precision="bf16")
# By the number of ranks.
TWO = {
    "zero1-bf16": dict(parallel=dict(zero_stage=1), train=BF16),
    "zero2": dict(parallel=dict(zero_stage=2), model=dict(tie_embeddings=False)),
    "zero3-bf16": dict(parallel=dict(zero_stage=3), train=BF16),
    "zero3-full": dict(parallel=dict(zero_stage=3), train=dict(activation_checkpointing="full")),
    "plain-bf16": dict(train=dict(engine="plain") | BF16),
    "fsdp-bf16": dict(parallel=dict(zero_stage=3), train=dict(engine="fsdp") | BF16),
    "fsdp2": dict(parallel=dict(zero_stage=2), train=dict(engine="fsdp", activation_checkpointing="full")),
    "tp2-sp-zero1-bf16": dict(parallel=dict(tensor_parallel=2, sequence_parallel=True, zero_stage=1), train=BF16),
    "tp2-gpt2": dict(
        parallel=dict(tensor_parallel=2),
        model=dict(norm="layernorm", activation="gelu", position="learned", dropout=0.1),
    ),
    "tp2-some": dict(parallel=dict(tensor_parallel=2), lora=dict(targets=("attention_output", "up"))),
}
FOUR = {
    "tp2-sp-zero3": dict(parallel=dict(tensor_parallel=2, sequence_parallel=True, zero_stage=3)),
    "tp2-fsdp": dict(parallel=dict(tensor_parallel=2, zero_stage=3), train=dict(engine="fsdp")),
    "tp2-zero2-bf16": dict(parallel=dict(tensor_parallel=2, zero_stage=2), train=BF16),
}


def check(pool: RankPool, sections: dict) -> None:
    """`verify`, which holds weights that are not trained to their bits; the first step's gradient of A is zero."""
    train = sections.get("train", {}) | {"init_from": "runs/base"}
    config = case(**sections | {"train": train, "lora": LORA | sections.get("lora", {})})
    reports = pool.run(verified, config, 3)
    assert reports[0].failures == []
    assert all(report.passed for report in reports)
    compared = {check.name for check in reports[0].of("gradient")}
    assert compared and all(name.endswith(("lora_a", "lora_b")) for name in compared)
    frozen = [check for check in reports[0].of("weight") if check.name.endswith(".weight")]
    assert frozen and all(check.bound == 0 for check in frozen)


@pytest.mark.parametrize("name", slow_but(["zero1-bf16", "tp2-sp-zero1-bf16"], TWO))
def test_two_ranks(name: str, two_ranks: RankPool) -> None:
    check(two_ranks, TWO[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_four_ranks(name: str, four_ranks: RankPool) -> None:
    check(four_ranks, FOUR[name])
