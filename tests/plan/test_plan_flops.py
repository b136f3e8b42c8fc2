"""FLOPs against a count of the operations themselves, and the table of peaks."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels.attention import Strided
from kernels.attention.reference import visible
from llm.config import DataConfig, ModelConfig, PhaseChange, RunConfig, TrainConfig
from llm.config.lora import LoRAConfig
from llm.config.sections import SparseAttention
from llm.model.parts import GPT_PARTS, PART_OF_LAYER
from llm.plan.flops import flops_by_part, flops_of_steps, flops_per_token, peak_tflops, recomputed_flops, visible_pairs
from llm.train.build import build_model
from meta_model import flops_of_step, meta_model

SHAPES = [
    dict(zip(("norm", "activation", "position", "tie_embeddings", "bias"), choice, strict=True))
    for choice in itertools.product(
        ["layernorm", "rmsnorm"],
        ["gelu", "swiglu"],
        ["learned", "rope"],
        [True, False],
        [True, False],
    )
]


def multiplied(model: ModelConfig) -> float:
    """Parameters that every token is multiplied with."""
    return flops_per_token(model, 0) / 6


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s.values())))
def test_n_is_every_parameter_but_the_tables_that_are_looked_up(shape: dict) -> None:
    model = ModelConfig(n_layer=2, n_head=4, n_kv_head=2, d_model=32, vocab_size=50, **shape)
    sizes = {name: p.numel() for name, p in build_model(RunConfig(model=model), None).named_parameters()}
    looked_up = sizes.get("position_table.weight", 0)
    if not model.tie_embeddings:
        looked_up += sizes["embedding.weight"]
    assert multiplied(model) == sum(sizes.values()) - looked_up


def test_non_causal_is_what_a_non_causal_forward_and_backward_multiplies() -> None:
    model = ModelConfig(n_layer=2, n_head=4, d_model=64, vocab_size=96, max_seq_len=32, bias=False)
    # The reference attention multiplies all of q k^T, and the counter sees its products.
    train = TrainConfig(impl="reference")
    config = RunConfig(model=model, data=DataConfig(seq_len=32), train=train)
    network = build_model(config, None)
    B, T = 2, 32
    tokens = torch.randint(0, 96, (B, T), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counted:
        network(tokens, torch.arange(T), torch.arange(B), tokens).backward()
    per_token = counted.get_total_flops() / (B * T)
    # The formula also counts 6 for each weight of the norms, which multiply no matrix.
    norms = 6 * sum(p.numel() for n, p in network.named_parameters() if "norm" in n)
    assert per_token == flops_per_token(model, T, "non-causal") - norms


def test_causal_is_half_the_attention_of_non_causal() -> None:
    model, T = ModelConfig(), 64
    both = flops_per_token(model, T, "non-causal") - flops_per_token(model, T, "causal")
    assert both == 6 * model.n_layer * model.d_model * T
    assert flops_per_token(model, 0, "causal") == 6 * multiplied(model)


def test_the_parts_are_those_of_the_model_and_sum_to_it() -> None:
    model = ModelConfig(n_layer=3, n_head=4, n_kv_head=2, d_model=32, vocab_size=50, attention_window=(5, None, 9))
    sizes: Counter[str] = Counter()
    for name, p in build_model(RunConfig(model=model), None).named_parameters():
        owner = name.split(".")[-2]
        sizes[PART_OF_LAYER[owner]] += p.numel()
    parts = flops_by_part(model, 20)
    assert tuple(parts) == GPT_PARTS
    del sizes["embedding"]  # looked up
    assert {name: 6 * count for name, count in sizes.items()} == {name: parts[name] for name in sizes}
    assert parts["head_loss"] == 6 * 50 * 32 and parts["embedding"] == 0
    assert sum(parts.values()) == flops_per_token(model, 20)


RECOMPUTED = {
    "full": dict(activation_checkpointing="full"),
    "full-every-2": dict(activation_checkpointing="full", checkpoint_every=2),
    "selective": dict(activation_checkpointing="selective", checkpoint_every=2),
    "none": {},
}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("name", RECOMPUTED)
def test_what_is_computed_again_is_counted(name: str, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelConfig(n_layer=3, n_head=4, d_model=64, vocab_size=96, max_seq_len=32, bias=False, dropout=dropout)
    config = RunConfig(model=model, data=DataConfig(seq_len=32), train=TrainConfig(**RECOMPUTED[name]))
    again = flops_of_step(meta_model(config, monkeypatch), 2, 32)
    once = flops_of_step(meta_model(replace(config, train=TrainConfig()), monkeypatch), 2, 32)
    # The formula also counts 2 for each weight of a block's two norms, which multiply no matrix.
    norms = 2 * 2 * 64 * {"full": 3, "full-every-2": 2}.get(name, 0)
    assert (again - once) / (2 * 32) == recomputed_flops(config, 32, "non-causal") - norms


def test_steps_with_what_is_computed_again() -> None:
    phases = (PhaseChange(64, seq_len=16),)
    config = RunConfig(data=DataConfig(seq_len=32, phases=phases), train=TrainConfig(activation_checkpointing="full"))
    once, again = (flops_of_steps(config, 1, 4, recomputed=flag) for flag in (False, True))
    expected = 32 * 32 * recomputed_flops(config, 32) + 2 * 32 * 16 * recomputed_flops(config, 16)
    assert again - once == pytest.approx(expected, rel=1e-12) and expected > 0


LAYERS = [
    *((window, None) for window in (None, 1, 2, 63, 64, 129, 200, 1000)),
    *(
        (None, SparseAttention(64 * b, local, stride))
        for b in (1, 2)
        for local in (1, 2, 3, 9)
        for stride in (1, 2, 3, 7)
    ),
]


@pytest.mark.parametrize("T", [1, 63, 64, 65, 300, 640])
def test_pairs_are_those_of_the_mask(T: int) -> None:
    for window, sparse in LAYERS:
        pattern = None if sparse is None else Strided(sparse.block, sparse.local, sparse.stride)
        mask = visible(1, T, T, window, pattern, None, torch.device("cpu"))
        assert visible_pairs(T, window, sparse) == int(mask.sum()), (window, sparse)


def test_each_layer_counts_what_it_sees() -> None:
    T, C, pattern = 200, 64, SparseAttention(64, 1, 2)
    shape = dict(n_layer=4, n_head=4, d_model=C, vocab_size=96, max_seq_len=T)
    model = ModelConfig(**shape, attention_window=(None, None, 5, None), attention_sparse=(None, pattern, None, None))
    pairs = [T * (T + 1) / 2, visible_pairs(T, None, pattern), 15 + 195 * 5, T * (T + 1) / 2]
    expected = 6 * multiplied(model) + sum(12 * C * (count / T - 0.5) for count in pairs)
    assert flops_per_token(model, T) == pytest.approx(expected, rel=1e-12)
    assert flops_per_token(model, T) < flops_per_token(ModelConfig(**shape), T)
    assert flops_per_token(model, T, "non-causal") == flops_per_token(ModelConfig(**shape), T, "non-causal")
    wide = ModelConfig(**shape, attention_window=T, attention_softcap=5.0)
    assert flops_per_token(wide, T) == flops_per_token(ModelConfig(**shape), T)


def test_gpt2_small_by_hand() -> None:
    model = ModelConfig(n_layer=12, n_head=12, d_model=768, vocab_size=50257, max_seq_len=1024, bias=True)
    block = 4 * 768**2 + 4 * 768 + 2 * 4 * 768**2 + 5 * 768 + 4 * 768
    N = 12 * block + 2 * 768 + 50257 * 768
    assert multiplied(model) == N == 124439808 - 1024 * 768
    assert flops_per_token(model, 1024, "non-causal") == 6 * N + 12 * 12 * 768 * 1024


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100 80GB PCIe", "bf16", 312),
        ("NVIDIA A100-SXM4-40GB", "fp32", 19.5),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H200", "fp16", 989.4),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("Tesla T4", "bf16", None),
        ("NVIDIA A10G", "bf16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "bf16", None),
        ("CPU", "fp32", None),
    ],
)
def test_the_peak_is_that_of_exactly_this_gpu(name: str, precision, peak: float | None) -> None:
    assert peak_tflops(name, precision) == peak


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_lora_counts_no_gradient_of_a_weight_that_is_not_trained(
    checkpointing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ModelConfig(n_layer=3, n_head=4, d_model=64, vocab_size=96, max_seq_len=32, bias=False)
    train = TrainConfig(activation_checkpointing=checkpointing, init_from="runs/base")
    config = RunConfig(model=model, data=DataConfig(seq_len=32), train=train, lora=LoRAConfig(rank=8))
    counted = flops_of_step(meta_model(config, monkeypatch), 2, 32) / (2 * 32)
    formula = flops_per_token(model, 32, "non-causal", config.lora) + recomputed_flops(config, 32, "non-causal")
    # The norms multiply no matrix, and nothing needs the gradient of what the first block's qkv and its A take in.
    norms = 4 * 7 * 64 + (2 * 2 * 3 * 64 if checkpointing == "full" else 0)
    first = 2 * (64 * 3 * 64 + 8 * 64)
    assert counted == formula - norms - first
    assert formula < 0.9 * (flops_per_token(model, 32, "non-causal") + recomputed_flops(config, 32, "non-causal"))
    steps = flops_of_steps(config, 0, 2)
    assert steps == 2 * 32 * 32 * flops_per_token(model, 32, "causal", config.lora)
