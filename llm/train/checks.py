"""Finds requests that cannot run although their config is right, before anything is allocated."""

from __future__ import annotations

from pathlib import Path

import torch

from kernels.attention.op import limits as attention_limits
from kernels.dispatch import KernelError, choose
from kernels.norm.op import no_triton as norm_limit
from llm.config import RunConfig
from llm.data.tokenizer import Tokenizer
from llm.errors import InputError, require
from llm.train.engines.base import DTYPES


def check_kernels(config: RunConfig, device: torch.device) -> str:
    """Say which form each kernel will take; InputError if one that the config asks for cannot run there."""
    model, dtype = config.model, DTYPES[config.train.precision]
    sparse = any(model.layer_sparse(layer) for layer in range(model.n_layer))
    no_triton, no_torch = attention_limits(model.head_dim, model.dropout, sparse, model.attention_softcap)
    norm = "layer_norm" if model.norm == "layernorm" else "rms_norm"
    limits: dict[str, dict[str, str | None]] = {
        "attention": {"no_triton": no_triton, "no_torch": no_torch},
        "embedding": {},
        **({"rope": {}} if model.position == "rope" else {}),
        norm: {"no_triton": norm_limit(model.d_model)},
        **({"dropout": {}} if model.dropout > 0 else {}),
        model.activation: {},
        "cross_entropy": {},
    }
    chosen: dict[str, list[str]] = {}
    try:
        for op, limit in limits.items():
            form = choose(config.train.impl, op, device=device, dtype=dtype, **limit)
            chosen.setdefault(form, []).append(op)
    except KernelError as error:
        raise InputError(f"train.impl: {error}") from error
    return "; ".join(f"{form}: {', '.join(ops)}" for form, ops in chosen.items())


def check_prompt(config: RunConfig, folder: Path) -> None:
    """Raise InputError unless the closing sample can be drawn; folder: of the data, with its tokenizer."""
    prompt = Tokenizer.load(folder / "tokenizer.json").encode(config.logging.sample_prompt)
    longest = config.model.max_seq_len
    require(
        config.logging.sample_tokens == 0 or 0 < len(prompt) < longest,
        f"logging.sample_prompt has {len(prompt)} tokens; expected at least 1 and fewer than model.max_seq_len "
        f"({longest}), or logging.sample_tokens=0",
    )
