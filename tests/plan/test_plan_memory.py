"""The closed forms of the model's size against a model that was built; of its state: tests/benchmarks/layout."""

from __future__ import annotations

from collections import Counter

import pytest

from llm.plan.memory import block_parameters, parameters
from llm.train.build import build_model
from tiny_run import case
from traffic_theory import replicated_parameters

MODELS = {
    "base": {},
    "learned": dict(position="learned", tie_embeddings=False),
    "swiglu": dict(activation="swiglu", norm="rmsnorm", bias=False),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_formulas_count_the_models_parameters(name: str) -> None:
    config = case(model=MODELS[name])
    model = build_model(config, None)
    sizes = Counter({key: p.numel() for key, p in model.named_parameters()})
    assert parameters(config.model, 1) == sizes.total()
    assert block_parameters(config.model, 1) == sum(n for key, n in sizes.items() if key.startswith("blocks."))
    replicated = ("norm", "attention_output.bias", "down.bias", "position_table")
    assert replicated_parameters(config.model) == sum(
        n for key, n in sizes.items() if any(word in key for word in replicated)
    )
