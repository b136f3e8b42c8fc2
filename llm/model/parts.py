"""The parts of the model, by which launch/plan.py counts and a profile measures."""

from __future__ import annotations

from typing import Literal, get_args

ModelPart = Literal["embedding", "norm", "qkv", "attention", "attention_output", "feed_forward", "head_loss"]
MODEL_PARTS: tuple[ModelPart, ...] = get_args(ModelPart)
# By the name of the layer (llm/model/gpt.py). What the model does after a layer, such as the activation after `up`,
# belongs to that layer's part.
PART_OF_LAYER: dict[str, ModelPart] = {
    "embedding": "embedding", "position_table": "embedding", "embedding_dropout": "embedding",
    "norm_1": "norm", "norm_2": "norm", "norm": "norm",
    "qkv": "qkv", "attention": "attention", "attention_output": "attention_output",
    "up": "feed_forward", "down": "feed_forward", "down_dropout": "feed_forward",
    "head": "head_loss",
}  # fmt: skip
