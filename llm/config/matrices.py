"""The hidden matrices of a model by name, those that one weight holds, and what optimizers keep of them."""

from __future__ import annotations

from llm.config.sections import ModelConfig, OptimConfig

# By the names that checkpoints, torch and DeepSpeed use.
MOMENTS = ("exp_avg", "exp_avg_sq")


def is_hidden(name: str) -> bool:
    """Whether the parameter of this name is a matrix of a block: the weight of one of its linears."""
    owner, kind = name.split(".")[-2:]
    return name.startswith("blocks.") and kind == "weight" and not owner.startswith("norm")


def fused(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """By layer, how many rows of its weight belong in turn to each of its matrices; a layer not named holds one.

    Of qkv with R queries for each key/value head of width D: R D rows of q, D of k, D of v, and again. With SwiGLU the
    rows of gate and up alternate. An LSTM's layer holds the matrices of i, f, g and o, one after the other.
    """
    if model.family == "lstm":
        return dict.fromkeys(("input", "recurrent"), (model.d_model,) * 4)
    queries = model.n_head // model.kv_heads
    pairs = {"up": (1, 1)} if model.activation == "swiglu" else {}
    return {"qkv": (queries * model.head_dim, model.head_dim, model.head_dim), **pairs}


def moments_of(name: str, optim: OptimConfig) -> tuple[str, ...]:
    """What the optimizer keeps of a trained parameter: Adam's moments, and of a matrix that Muon updates the first."""
    return MOMENTS[:1] if optim.name == "muon" and is_hidden(name) else MOMENTS
