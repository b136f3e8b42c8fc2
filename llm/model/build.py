"""Makes a model of the family that its config names."""

from __future__ import annotations

from typing import TypeAlias

from llm.config import ModelConfig
from llm.model.cache import KVCache
from llm.model.gpt import GPT, Recompute
from llm.model.layers import DenseLayers
from llm.model.lstm import LSTM, LSTMState

Model: TypeAlias = GPT | LSTM
Cache: TypeAlias = KVCache | LSTMState


def model_of(
    config: ModelConfig,
    layers: DenseLayers | None = None,
    recompute: Recompute = "none",
    recompute_every: int = 1,
    labels: int | None = None,
) -> Model:
    """The model with its initial weights; on the meta device with none. An LSTM has no `recompute`, no `labels`."""
    if config.family == "lstm":
        return LSTM(config, layers)
    return GPT(config, layers, recompute=recompute, recompute_every=recompute_every, labels=labels)


def cache_of(model: Model, capacity: int) -> Cache:
    """An empty cache for `capacity` positions, for the model's `cache`: keys and values, or the state of an LSTM."""
    return LSTMState() if isinstance(model, LSTM) else KVCache(capacity)
