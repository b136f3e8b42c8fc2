"""FP8 under every layout: operands of the same bits, faults that `verify` finds, and steps that are refused."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from fp8_faults import FAULTS

from chosen import slow_but
from llm.config import RunConfig
from llm.parity import oracle
from llm.parity.compare import NORM_SHARE, Check, distance
from matrix import verified
from pool import RankPool
from tiny_run import case

SP = dict(tensor_parallel=2, sequence_parallel=True)
FULL = dict(activation_checkpointing="full")
TWO = {
    "tp2": case(parallel=dict(tensor_parallel=2, zero_stage=1), train=dict(fp8="tensorwise")),
    "tp2-sp": case(parallel=SP, train=dict(fp8="tensorwise", **FULL)),
    "tp2-sp-zero3": case(parallel=SP | dict(zero_stage=3), train=dict(fp8="tensorwise", fp8_weight_grad="high")),
    "zero2": case(parallel=dict(zero_stage=2), train=dict(fp8="tensorwise")),
    "fsdp": case(parallel=dict(zero_stage=3), train=dict(fp8="tensorwise", engine="fsdp", **FULL)),
}


def farthest(config: RunConfig, fault: str = "") -> float:
    """The largest |g - o| / |o - e| of a gradient g that both oracles have, o in FP8 and e in fp32. Collective."""
    found = [0.0]

    def check(
        name: str, step: int, g: torch.Tensor, o: torch.Tensor, e: torch.Tensor, all_gradients: float, *, fp8: bool
    ) -> Check:
        error = max(0.0, distance(g, o) - NORM_SHARE * all_gradients)
        found.append(error / distance(o, e))
        return Check("gradient", name, step, 0.0, 1.0, 1.0)

    with patch.object(oracle, "gradient_check", check):
        if not fault:
            verified(config)
        else:
            with FAULTS[fault]():
                verified(config)
    return max(found)


@pytest.mark.parametrize("name", slow_but(["tp2-sp", "fsdp"], TWO))
def test_operands_have_the_same_bits(name: str, two_ranks: RankPool) -> None:
    """In fp32 two layouts differ by so little that next to no element of an operand is rounded to another side."""
    assert two_ranks.run(farthest, TWO[name])[0] < 0.02


def test_gradients_of_another_format_are_not_the_same(two_ranks: RankPool) -> None:
    assert two_ranks.run(farthest, TWO["tp2"], "gradients-in-e4m3")[0] > 0.5


def judged(config: RunConfig, fault: str) -> str:
    """What `verify` says. Collective."""
    try:
        with FAULTS[fault]():
            return "PASS" if verified(config).passed else "FAIL"
    except ValueError as error:  # on every rank
        return str(error)


ROWS = case(parallel=SP | dict(zero_stage=1), train=dict(fp8="rowwise", precision="bf16"))
FOUND: dict[str, tuple[str, RunConfig, str]] = {
    "own-largest": ("own-largest", TWO["tp2-sp"], "FAIL"),
    "own-largest-rows": ("own-largest", ROWS, "FAIL"),
    "scale-of-the-wrong-tensor": ("scale-of-the-wrong-tensor", TWO["tp2"], "FAIL"),
    "scale-of-the-wrong-row": ("scale-of-the-wrong-tensor", ROWS, "FAIL"),
    "not-dequantised": ("not-dequantised", TWO["tp2"], "FAIL"),
    "formats-swapped": ("formats-swapped", TWO["tp2"], "the right FP8 operand is in torch.float8_e5m2"),
    "scale-of-the-wrong-rank": ("scale-of-the-wrong-rank", TWO["tp2-sp"], "FAIL"),
    "scale-of-the-wrong-rank-rows": ("scale-of-the-wrong-rank", ROWS, "FAIL"),
    "not-gathered-in-order": ("not-gathered-in-order", TWO["tp2-sp"], "FAIL"),
    "partial-sums": ("partial-sums", TWO["tp2"], "FAIL"),
}


@pytest.mark.parametrize("name", slow_but(["own-largest", "scale-of-the-wrong-rank-rows"], FOUND))
def test_verify_finds_a_fault(name: str, two_ranks: RankPool) -> None:
    fault, config, verdict = FOUND[name]
    assert all(said.startswith(verdict) for said in two_ranks.run(judged, config, fault))
