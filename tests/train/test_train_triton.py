"""One training step with the Triton kernels, interpreted, equals the reference's: loss and every gradient."""

from __future__ import annotations

import numpy as np
import pytest

from chosen import slow_but
from pool import RankPool
from tiny_run import case, on_ranks

LAYOUTS = {
    "gpt2": dict(model=dict(norm="layernorm", activation="gelu", position="learned")),
    "llama": dict(model=dict(norm="rmsnorm", activation="swiglu", position="rope")),
    "zero3": dict(parallel=dict(zero_stage=3)),
    "zero3-recompute-dropout": dict(
        parallel=dict(zero_stage=3),
        model=dict(dropout=0.1),
        train=dict(activation_checkpointing="full"),
    ),
    "tp2-dropout": dict(parallel=dict(tensor_parallel=2), model=dict(dropout=0.1)),
    "tp2-sp-documents-dropout": dict(
        parallel=dict(tensor_parallel=2, sequence_parallel=True),
        model=dict(dropout=0.1, position="learned"),
        data=dict(document_masks=True),
    ),
}


@pytest.mark.parametrize("name", slow_but(["llama"], LAYOUTS))
def test_triton_equals_reference(name: str, two_ranks: RankPool) -> None:
    sections = LAYOUTS[name]
    results = {}
    for impl in ("triton", "reference"):
        train = {**sections.get("train", {}), "impl": impl, "micro_batch_size": 4}
        config = case(**{**sections, "train": train})
        results[impl] = two_ranks.run(on_ranks, config, 1)[0]
    triton, reference = results["triton"], results["reference"]
    np.testing.assert_allclose(triton["losses"], reference["losses"], rtol=1e-6)
    np.testing.assert_allclose(triton["validation"], reference["validation"], rtol=1e-6)
    whole = np.sqrt(sum(float((g**2).sum()) for g in reference["gradients"].values()))
    for parameter, expected in reference["gradients"].items():
        error = np.linalg.norm(triton["gradients"][parameter] - expected)
        assert error <= 1e-5 * np.linalg.norm(expected) + 1e-7 * whole, parameter
