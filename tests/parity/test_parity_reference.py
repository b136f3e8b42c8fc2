"""No layout changes the result: every one gives the plain engine's losses, gradients and norms."""

from __future__ import annotations

import numpy as np
import pytest

import tiny_run
from pool import RankPool
from tiny_run import case, on_ranks, oracle

STEPS = 4


def check(config, results, ragged=False, loss=1e-5, gradient=1e-5) -> None:
    expected = oracle(config, STEPS, ragged)
    got = results[0]
    assert all(r["losses"] == got["losses"] for r in results), "ranks report different losses"
    np.testing.assert_allclose(got["losses"], expected["losses"], atol=loss)
    np.testing.assert_allclose(got["norms"], expected["norms"], rtol=10 * gradient)
    np.testing.assert_allclose(got["validation"], expected["validation"], atol=loss)
    whole = np.sqrt(sum(float((g**2).sum()) for g in expected["gradients"].values()))
    assert got["gradients"].keys() == expected["gradients"].keys()
    for name, reference in expected["gradients"].items():
        error = np.linalg.norm(got["gradients"][name] - reference)
        bound = gradient * np.linalg.norm(reference) + 1e-7 * whole
        assert error <= bound, f"{name}: error {error:.2e}, bound {bound:.2e}"


# Beside the matrix of layouts (test_parity_matrix.py), where every step starts from equal weights: whole
# trajectories, and what is not one of its axes.
TWO_RANKS = {
    "tp2-learned-rms-swiglu": dict(
        parallel=dict(tensor_parallel=2),
        model=dict(position="learned", norm="rmsnorm", activation="swiglu", bias=False),
    ),
    "tp2-padded": dict(parallel=dict(tensor_parallel=2), model=dict(vocab_size=51)),
    "zero0-one-micro-batch": dict(train=dict(micro_batch_size=4)),
    "zero2-micro-1": dict(parallel=dict(zero_stage=2), train=dict(micro_batch_size=1)),
    "zero3-recompute-dropout": dict(
        parallel=dict(zero_stage=3),
        model=dict(dropout=0.1),
        train=dict(activation_checkpointing="full"),
    ),
}


@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks(name: str, two_ranks: RankPool) -> None:
    config = case(**TWO_RANKS[name])
    check(config, two_ranks.run(on_ranks, config, STEPS))


@pytest.mark.parametrize("stage", range(4))
def test_unequal_counts_of_targets(stage: int, two_ranks: RankPool) -> None:
    config = case(parallel=dict(zero_stage=stage))
    check(config, two_ranks.run(on_ranks, config, STEPS, True), ragged=True)


def test_four_ranks(four_ranks: RankPool) -> None:
    config = case(parallel=dict(tensor_parallel=2, zero_stage=1), model=dict(dropout=0.1))
    check(config, four_ranks.run(on_ranks, config, STEPS))


def check_low_precision(config, results) -> None:
    """The layout is at most four times as far from fp32 as the oracle in the same precision."""
    got, low, exact = results[0], oracle(config, STEPS), oracle(case(), STEPS)
    for name, reference in exact["gradients"].items():
        own = np.linalg.norm(low["gradients"][name] - reference)
        error = np.linalg.norm(got["gradients"][name] - reference)
        assert error <= 4 * own + 1e-7, f"{name}: {error:.2e} against the oracle's {own:.2e}"
    own = np.abs(np.subtract(low["losses"], exact["losses"])).max()
    assert np.abs(np.subtract(got["losses"], exact["losses"])).max() <= 4 * own


@pytest.mark.parametrize(("stage", "tp"), [(1, 1), (3, 2)])
def test_bf16_is_as_close_to_fp32_as_the_oracle(stage: int, tp: int, two_ranks: RankPool) -> None:
    config = case(parallel=dict(zero_stage=stage, tensor_parallel=tp), train=dict(precision="bf16"))
    check_low_precision(config, two_ranks.run(on_ranks, config, STEPS))


def test_the_comparison_can_fail(two_ranks: RankPool) -> None:
    config = case(parallel=dict(zero_stage=1))
    results = two_ranks.run(on_ranks, config, STEPS)
    gradient = results[0]["gradients"]["norm.weight"]
    gradient[np.abs(gradient).argmax()] *= 1.001
    with pytest.raises(AssertionError, match=r"norm\.weight"):
        check(config, results)


def test_base_vocabulary_needs_padding() -> None:
    assert tiny_run.V % 4
