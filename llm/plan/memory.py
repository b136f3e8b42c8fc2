"""Sizes of the model in closed form: elements of its parameters on one rank."""

from __future__ import annotations

from llm.config import ModelConfig


def parameters(model: ModelConfig, tp: int = 1) -> int:
    """N: elements of all parameters on one of `tp` ranks, the vocabulary padded to a multiple of tp."""
    tables = (1 if model.tie_embeddings else 2) * -(-model.vocab_size // tp) * model.d_model
    return tables + position_parameters(model) + norm_parameters(model) + block_parameters(model, tp)


def block_parameters(model: ModelConfig, tp: int = 1) -> int:
    """N_L: elements of the blocks' parameters on one of `tp` ranks."""
    C, F, bias = model.d_model, model.ff_dim, int(model.bias)
    columns = (model.n_head + 2 * model.kv_heads) * model.head_dim + F * (2 if model.activation == "swiglu" else 1)
    split = columns * (C + bias) + C * C + F * C
    return model.n_layer * (split // tp + 2 * bias * C + 2 * norm_parameters(model))


def position_parameters(model: ModelConfig) -> int:
    """Elements of the table of learned positions; 0 where positions are rotary."""
    return model.max_seq_len * model.d_model if model.position == "learned" else 0


def norm_parameters(model: ModelConfig) -> int:
    """Elements of one norm."""
    return model.d_model * (1 if model.norm == "rmsnorm" else 1 + int(model.bias))
