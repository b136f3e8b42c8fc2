"""Layouts to verify: every axis of the matrix, and samples of it in which each pair (or triple) of options meets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import combinations, product
from typing import Any, TypeAlias
from unittest.mock import patch

import torch

from llm.config import RunConfig
from llm.parallel.mesh import Mesh
from llm.parity.report import Report
from llm.parity.verify import check_parity
from tiny_run import case

Case: TypeAlias = dict[str, Any]
Options: TypeAlias = frozenset[tuple[str, Any]]
"""Some (axis, option) pairs, of different axes."""

# Tensor-parallel ranks, data-parallel ranks, sequence parallelism.
LAYOUTS = {
    "dense": (1, 1, False),
    "tp2": (2, 1, False),
    "tp2-sp": (2, 1, True),
    "tp4": (4, 1, False),
    "tp4-sp": (4, 1, True),
    "dp2": (1, 2, False),
    "dp4": (1, 4, False),
    "tp2-dp2": (2, 2, False),
    "tp2-sp-dp2": (2, 2, True),
}
FAMILIES = {
    "gpt2": dict(norm="layernorm", activation="gelu", position="learned", bias=True),
    "llama": dict(norm="rmsnorm", activation="swiglu", position="rope", bias=False),
}
COMMON = {
    "precision": ("fp32", "bf16"),
    "embeddings": ("tied", "untied"),
    "accumulation": (1, 4),
    "checkpointing": ("none", "full", "selective"),
    "dropout": (0.0, 0.1),
    "family": tuple(FAMILIES),
    "z_loss": (0.0, 1e-3),
    "documents": (False, True),
    "optimizer": ("adamw", "muon"),
    "compile": ("none", "blocks"),
    "fp8": ("none", "tensorwise", "tensorwise-high", "rowwise", "rowwise-high"),
}
DEEPSPEED = {"engine": ("deepspeed",), "layout": tuple(LAYOUTS), "zero": (0, 1, 2, 3), **COMMON}
FSDP = {"engine": ("fsdp",), "layout": ("dp2", "dp4", "tp2-dp2", "tp2-sp-dp2"), "zero": (2, 3), **COMMON}
# What cannot be, and why; the config refuses each.
IMPOSSIBLE: dict[Options, str] = {
    frozenset({("engine", "deepspeed"), ("zero", 0), ("precision", "bf16")}): (
        "without ZeRO DeepSpeed accumulates gradients in bf16"
    ),
    frozenset({("engine", "deepspeed"), ("zero", 3), ("compile", "blocks")}): (
        "DeepSpeed's ZeRO 3 gathers weights within a block"
    ),
    **{
        frozenset({("fp8", fp8), ("precision", "fp32")}): "scales for rows give bf16"
        for fp8 in ("rowwise", "rowwise-high")
    },
}
BATCH = 16  # four data-parallel ranks with four micro-batches each


def possible(options: Options) -> bool:
    return not any(impossible <= options for impossible in IMPOSSIBLE)


def met(chosen: Mapping[str, Any], strength: int) -> set[Options]:
    """Every set of `strength` options that meet in a case, complete or not."""
    return {frozenset(options) for options in combinations(chosen.items(), strength)}


def wanted(axes: Mapping[str, Sequence[Any]], strength: int) -> list[Options]:
    """Every set of `strength` options of different axes that some possible case has, in a fixed order."""
    return [
        frozenset(zip(names, options, strict=True))
        for names in combinations(axes, strength)
        for options in product(*(axes[name] for name in names))
        if completed(dict(zip(names, options, strict=True)), axes, {}, 1)
    ]


def completed(chosen: Case, axes: Mapping[str, Sequence[Any]], left: Mapping[Options, Any], strength: int) -> Case:
    """A possible case with these options, or {} if there is none.

    Of each other axis in turn it has the option with which most of `left` meet, unless that one ends in no case.
    """
    if not possible(frozenset(chosen.items())):
        return {}
    name = next((name for name in axes if name not in chosen), None)
    if name is None:
        return {name: chosen[name] for name in axes}
    others = list(combinations(chosen.items(), strength - 1))
    options = sorted(axes[name], key=lambda option: -sum(frozenset({*o, (name, option)}) in left for o in others))
    return next((case for each in options if (case := completed({**chosen, name: each}, axes, left, strength))), {})


def sample(axes: Mapping[str, Sequence[Any]], strength: int) -> list[Case]:
    """A small list of cases in which all `wanted` options meet: greedily those that complete the first one left.

    The same list every time.
    """
    left = dict.fromkeys(wanted(axes, strength))
    cases = []
    while left:
        cases.append(completed(dict(next(iter(left))), axes, left, strength))
        for options in met(cases[-1], strength):
            left.pop(options, None)
    return cases


def name_of(chosen: Case) -> str:
    return "-".join(str(option) for option in chosen.values())


def world_size(chosen: Case) -> int:
    tp, dp, _ = LAYOUTS[chosen["layout"]]
    return tp * dp


def config_of(chosen: Case) -> RunConfig:
    """The tiny run of tests/tiny_run.py under the options of a case."""
    tp, dp, sequence_parallel = LAYOUTS[chosen["layout"]]
    fp8, _, weight_grad = chosen["fp8"].partition("-")
    return case(
        model=dict(
            d_model=64 if fp8 != "none" and tp == 4 else 32,  # in FP8 a multiple of 16 on each rank
            n_kv_head=4 if tp == 4 else 2,
            tie_embeddings=chosen["embeddings"] == "tied",
            dropout=chosen["dropout"],
            **FAMILIES[chosen["family"]],
        ),
        data=dict(document_masks=chosen["documents"]),
        optim=dict(name=chosen["optimizer"]),
        parallel=dict(tensor_parallel=tp, sequence_parallel=sequence_parallel, zero_stage=chosen["zero"]),
        train=dict(
            engine=chosen["engine"],
            precision=chosen["precision"],
            fp8=fp8,
            fp8_weight_grad=weight_grad or "fp8",
            global_batch_size=BATCH,
            micro_batch_size=BATCH // (dp * chosen["accumulation"]),
            activation_checkpointing=chosen["checkpointing"],
            z_loss=chosen["z_loss"],
            compile=chosen["compile"],
        ),
    )


def graphs_by(backend: str, config: RunConfig) -> AbstractContextManager:
    """What torch.compile makes of the traced operators: `aot_eager` runs them as they are, `inductor` compiles them."""
    return patch("llm.train.compiled.BACKEND", backend) if config.train.compile == "blocks" else nullcontext()


def verified(config: RunConfig, steps: int = 2, backend: str = "aot_eager") -> Report:
    """`verify` on this rank of a pool, on the CPU. Collective."""
    with graphs_by(backend, config):
        return check_parity(config, Mesh.create(config.parallel, "cpu"), torch.device("cpu"), steps)
