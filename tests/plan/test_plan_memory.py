"""The closed forms against a model that was built; of the training state: tests/benchmarks/layout."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from llm.config import ParallelConfig, RunConfig
from llm.config.lora import is_factor
from llm.config.matrices import moments_of
from llm.model.parts import PART_OF_LAYER
from llm.plan.memory import (
    LOGITS,
    TrainingState,
    activations,
    block_parameters,
    factors_by_part,
    frozen_masters,
    gathered,
    held_and_trained,
    hidden_parameters,
    offloaded,
    parameters,
    parameters_by_part,
    rank_memory,
    training_state,
)
from llm.train.build import build_model
from meta_model import meta_model, saved_bytes
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


@pytest.mark.parametrize("name", [*MODELS, "lstm"])
def test_muon_has_one_moment_of_the_blocks_matrices(name: str) -> None:
    lstm = dict(family="lstm", n_head=4, n_kv_head=None, position="learned")
    config = case(model=MODELS.get(name, lstm), optim=dict(name="muon"), train=dict(engine="plain"))
    sizes = {key: p.numel() for key, p in build_model(config, None).named_parameters()}
    kept = sum(4 * n * len(moments_of(key, config.optim)) for key, n in sizes.items())
    assert kept == training_state(config, 1).moments < training_state(case(model=MODELS.get(name, lstm)), 1).moments
    if name != "lstm":
        assert hidden_parameters(config.model, 2) * 2 == hidden_parameters(config.model)
        sharded = replace(config, train=replace(config.train, engine="fsdp"), parallel=ParallelConfig(zero_stage=3))
        assert training_state(sharded, 4).moments == pytest.approx(kept / 4, abs=8)


ACTIVATIONS: dict[str, dict[str, Any]] = {
    "gpt2": dict(model=dict(position="learned", n_kv_head=None)),
    "llama": dict(model=dict(activation="swiglu", norm="rmsnorm", bias=False, tie_embeddings=False)),
    "fp32": dict(train=dict(precision="fp32")),
    "full": dict(train=dict(activation_checkpointing="full", checkpoint_every=2)),
    "selective": dict(train=dict(activation_checkpointing="selective")),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_that_a_forward_pass_keeps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    B, T, C, V = 2, 256, 256, 512
    given = ACTIVATIONS[name]
    shape = dict(n_layer=4, n_head=4, d_model=C, vocab_size=V, max_seq_len=T) | given.get("model", {})
    train = dict(precision="bf16", micro_batch_size=B) | given.get("train", {})
    config = case(model=shape, train=train, data=dict(seq_len=T), parallel=dict(zero_stage=1))
    theory, w = activations(config), 4 if name == "fp32" else 2
    none = replace(config, train=replace(config.train, activation_checkpointing="none", checkpoint_every=1))
    # The block that the backward pass computes again, and its logits: they are not there after the forward pass.
    block = activations(none).blocks // 4 if name == "full" else 0
    kept = theory.blocks - block + theory.head - min(B * T, LOGITS) * V * w
    # Statistics of the norms and the like are not in the formula.
    assert saved_bytes(meta_model(config, monkeypatch), B, T) == pytest.approx(kept, rel=0.01)


def test_tensor_and_sequence_parallelism_divide_the_activations() -> None:
    def blocks(**parallel: Any) -> int:
        return activations(case(parallel=parallel, model=dict(n_kv_head=4))).blocks

    whole, tp, sp = blocks(), blocks(tensor_parallel=2), blocks(tensor_parallel=2, sequence_parallel=True)
    stream = 2 * 2 * 16 * 4 * 4 * 32  # layers, rows, tokens, 4 C in fp32
    assert tp == (whole - stream) // 2 + stream and sp == whole // 2


def test_offloading_moves_what_the_docs_say() -> None:
    def moved(**parallel: Any) -> tuple[int, ...]:
        config = case(parallel=parallel, train=dict(precision="bf16"))
        state, host = training_state(config, 4), offloaded(config, 4)
        assert sum(rank_memory(config, 4).values()) > sum(state) - sum(host)
        return tuple(host)

    n = parameters(case().model)
    assert moved(zero_stage=2) == (0, 0, 0)
    assert moved(zero_stage=1, offload="optimizer") == (n, 2 * n, 0)
    assert moved(zero_stage=3, offload="optimizer") == (n, 2 * n, n)
    assert moved(zero_stage=3, offload="all") == (6 * n // 4, 2 * n, n)


def test_weights_of_other_ranks_are_gathered() -> None:
    model = case().model
    n, blocks = parameters(model), block_parameters(model)
    few = {"zero_optimization": {"stage3_max_live_parameters": 1000}}
    assert gathered(case(parallel=dict(zero_stage=2))) == 0
    assert gathered(case(parallel=dict(zero_stage=3))) == 4 * n
    assert gathered(replace(case(parallel=dict(zero_stage=3)), deepspeed=few)) == 4000
    fsdp = dict(engine="fsdp", precision="bf16")
    assert gathered(case(parallel=dict(zero_stage=2), train=fsdp)) == 2 * n
    assert gathered(case(parallel=dict(zero_stage=3), train=fsdp)) == 2 * (n - blocks + 2 * blocks // 2)


def test_a_tensor_parallel_rank_has_its_slices() -> None:
    model = case(model=dict(n_kv_head=4, vocab_size=51)).model
    whole, half = parameters_by_part(model), parameters_by_part(model, 2)
    assert half["embedding"] == 26 * 32 and half["norm"] == whole["norm"] and half["qkv"] == whole["qkv"] // 2
    assert half["feed_forward"] == (whole["feed_forward"] - 2 * 32) // 2 + 2 * 32  # its last bias is on every rank


def with_lora(**sections: Any) -> RunConfig:
    given = {"lora": dict(rank=3), **sections}
    return case(**given | {"train": given.get("train", {}) | {"init_from": "runs/base"}})


@pytest.mark.parametrize("targets", [("qkv", "attention_output", "up", "down"), ("up",)])
@pytest.mark.parametrize("name", MODELS)
def test_the_factors_are_those_of_the_model(name: str, targets: tuple[str, ...]) -> None:
    config = with_lora(model=MODELS[name], lora=dict(rank=3, targets=targets))
    sizes = {key: p.numel() for key, p in build_model(config, None).named_parameters()}
    found: Counter[str] = Counter()
    for key in filter(is_factor, sizes):
        found[PART_OF_LAYER[key.split(".")[-2]]] += sizes[key]
    assert factors_by_part(config.model, config.lora) == found
    assert held_and_trained(config) == (sum(sizes.values()), found.total())
    assert held_and_trained(case()) == (parameters(case().model), parameters(case().model))


def test_a_tensor_parallel_rank_has_one_factor_whole() -> None:
    """K = 4: qkv is 96 wide, up and down 128."""
    config = with_lora(model=dict(n_kv_head=4))
    half = factors_by_part(config.model, config.lora, 2)
    layers, rank, C = 2, 3, 32
    assert half["qkv"] == layers * rank * (C + 96 // 2)
    assert half["attention_output"] == layers * rank * (C // 2 + C)
    assert half["feed_forward"] == layers * rank * (C + 128 // 2 + 128 // 2 + C)


def test_lora_trains_the_factors_alone() -> None:
    """The fp32 values of the rest are in the CPU's memory under ZeRO, and are the weights elsewhere."""
    n, trained = held_and_trained(with_lora())
    bf16, fsdp = dict(precision="bf16"), dict(engine="fsdp", precision="bf16")
    d, part, frozen = 4, 4 * trained // 4, 4 * (n - trained) // 4
    expected = {
        (0, "fp32"): (TrainingState(4 * n, 8 * trained, 4 * trained), 0),
        (1, "bf16"): (TrainingState(2 * n + part, 2 * part, 4 * trained), frozen),
        (2, "bf16"): (TrainingState(2 * n + part, 2 * part, part), frozen),
        (3, "bf16"): (TrainingState(2 * n // d + part, 2 * part, part), frozen),
    }
    for (stage, precision), found in expected.items():
        config = with_lora(parallel=dict(zero_stage=stage), train=dict(precision=precision))
        assert (training_state(config, d), frozen_masters(config, d)) == found
    config = with_lora(parallel=dict(zero_stage=3), train=fsdp)
    assert (training_state(config, d), frozen_masters(config, d)) == (TrainingState(n, 2 * part, part), 0)
    first = with_lora(parallel=dict(zero_stage=1), train=bf16)
    assert rank_memory(first, d)["the last micro-batch's"] == 2 * trained
    assert activations(case()).head - activations(with_lora()).head == 4 * 50 * 32  # the projection's gradient
    assert frozen_masters(case(parallel=dict(zero_stage=2)), d) == 0
