"""Attention's window, pattern and softcap in the model: against masks made by hand, Mistral, and without a cache."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm.config import ModelConfig
from llm.config.sections import SparseAttention
from llm.model.cache import KVCache
from llm.model.forms import Forms
from llm.model.gpt import GPT, Recompute
from llm.model.layers import DenseLayers, Documents

STRIDED = SparseAttention(64, 1, 2)
# The options, and a length at which each of them hides keys.
VARIANTS: dict[str, tuple[dict[str, Any], int]] = {
    "window": (dict(attention_window=3), 12),
    "one-key": (dict(attention_window=1), 12),
    "alternating": (dict(attention_window=(4, None), attention_softcap=2.0), 12),
    "softcap": (dict(attention_softcap=0.5), 12),
    "sparse": (dict(attention_sparse=STRIDED), 200),
    "sparse-and-windows": (dict(attention_sparse=(None, STRIDED), attention_window=(70, None, 5, None)), 200),
}


def build(T: int, recompute: Recompute = "none", impl: str = "auto", **options: Any) -> GPT:
    """Four blocks with weights so large that what attention hides shows in every logit."""
    fields = dict(n_layer=4, n_head=4, n_kv_head=2, d_model=32, vocab_size=50, max_seq_len=T)
    model = GPT(ModelConfig(**{**fields, **options}), DenseLayers(seed=7, forms=Forms.of(impl)), recompute=recompute)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(float("norm" in name and name.endswith("weight")), 0.2, generator=generator)
    return model


def batch(T: int, B: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens = torch.randint(0, 50, (B, T + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], torch.arange(T), torch.arange(B), tokens[:, 1:]


def hand_made_mask(T: int, window: int | None, sparse: SparseAttention | None) -> Tensor:
    mask = torch.zeros(T, T, dtype=torch.bool)
    for i in range(T):
        for j in range(i + 1):
            near = window is None or i - j < window
            if sparse is not None:
                apart = i // sparse.block - j // sparse.block
                near = near and (apart < sparse.local or apart % sparse.stride == 0)
            mask[i, j] = near
    return mask


def by_hand(model: GPT, tokens: Tensor) -> Tensor:
    """Logits of a model with learned positions, layer norm and GELU, a head at a time."""
    config, p, T = model.config, dict(model.named_parameters()), tokens.shape[1]
    C, D, R = config.d_model, config.head_dim, config.n_head // config.kv_heads

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (C,), p[f"{name}.weight"], p[f"{name}.bias"])

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    windows = config.attention_window if isinstance(config.attention_window, tuple) else (config.attention_window,)
    patterns = config.attention_sparse if isinstance(config.attention_sparse, tuple) else (config.attention_sparse,)
    x = p["embedding.weight"][tokens] + p["position_table.weight"][:T]
    for i in range(config.n_layer):
        mask = hand_made_mask(T, windows[i % len(windows)], patterns[i % len(patterns)])
        qkv = linear(norm(x, f"blocks.{i}.norm_1"), f"blocks.{i}.qkv").unflatten(-1, (config.kv_heads, R + 2, D))
        heads = []
        for h in range(config.n_head):
            q, k, v = (qkv[:, :, h // R, part] for part in (h % R, R, R + 1))
            scores = q @ k.mT / math.sqrt(D)
            if config.attention_softcap:
                scores = config.attention_softcap * torch.tanh(scores / config.attention_softcap)
            heads.append(scores.masked_fill(~mask, -math.inf).softmax(-1) @ v)
        x = x + linear(torch.cat(heads, -1), f"blocks.{i}.attention_output")
        up = linear(norm(x, f"blocks.{i}.norm_2"), f"blocks.{i}.up")
        x = x + linear(F.gelu(up, approximate="tanh"), f"blocks.{i}.down")
    return norm(x, "norm") @ p["embedding.weight"].T


IMPLS = ["auto", "reference", pytest.param("triton", marks=pytest.mark.slow)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_gradients_are_those_of_a_mask_made_by_hand(name: str, impl: str) -> None:
    options, T = VARIANTS[name]
    tokens, positions, samples, targets = batch(T)
    model = build(T, impl=impl, **options)
    logits, expected = model(tokens, positions, samples), by_hand(model, tokens)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-5)
    dense = by_hand(build(T), tokens)
    assert (expected - dense).abs().max() > 0.1, "the options change nothing"
    loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="sum")
    found = torch.autograd.grad(model(tokens, positions, samples, targets), list(model.parameters()))
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    for (parameter, _), grad, right in zip(model.named_parameters(), found, gradients, strict=True):
        assert (grad - right).norm() <= 1e-5 * right.norm() + 1e-5, parameter


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_keeps_the_options(recompute: Recompute) -> None:
    options, T = VARIANTS["sparse-and-windows"]
    found = []
    for each in ("none", recompute):
        model = build(T, each, dropout=0.2, attention_softcap=2.0, **options)
        model(*batch(T)).backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@torch.no_grad()
def test_a_window_ends_at_its_document() -> None:
    T, start = 12, 5
    model = build(T, attention_window=(4, 1, None), position="rope")
    tokens, positions, samples, _ = batch(T, 1)
    documents = Documents(torch.tensor([[*range(start), *range(T - start)]]), torch.tensor([0, start, T]).int())
    together = model(tokens, positions, samples, documents=documents)
    apart = [model(part, torch.arange(part.shape[1]), samples) for part in (tokens[:, :start], tokens[:, start:])]
    torch.testing.assert_close(together, torch.cat(apart, dim=1), atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_a_window_is_mistrals() -> None:
    """Jiang et al. 2023, as `transformers` computes it."""
    transformers = pytest.importorskip("transformers")
    T, C, H, K, W = 24, 32, 4, 2, 5
    torch.manual_seed(3)
    theirs = transformers.MistralForCausalLM(
        transformers.MistralConfig(
            vocab_size=50, hidden_size=C, intermediate_size=48, num_hidden_layers=2, num_attention_heads=H,
            num_key_value_heads=K, sliding_window=W, max_position_embeddings=T, rms_norm_eps=1e-5,
            initializer_range=0.2, attn_implementation="eager",
        )
    ).eval()  # fmt: skip
    ours = build(
        T, n_layer=2, d_ff=48, norm="rmsnorm", activation="swiglu", position="rope", bias=False, tie_embeddings=False,
        attention_window=W,
    )  # fmt: skip
    weights = theirs.state_dict()
    state = {f"{name}.weight": weights[f"model.{source}.weight"] for name, source in NAMES.items()}
    state["head.weight"] = weights["lm_head.weight"]
    for i in range(2):
        layer = {name: weights[f"model.layers.{i}.{source}.weight"] for name, source in LAYER_NAMES.items()}
        q, k, v = (layer.pop(name).unflatten(0, (K, -1)) for name in "qkv")
        gate, up = layer.pop("gate"), layer.pop("up")
        layer |= {"qkv": torch.cat([q, k, v], dim=1).flatten(0, 1), "up": torch.stack([gate, up], 1).flatten(0, 1)}
        state |= {f"blocks.{i}.{name}.weight": value for name, value in layer.items()}
    ours.load_state_dict(state)
    tokens, positions, samples, _ = batch(T)
    expected = theirs(tokens).logits
    torch.testing.assert_close(ours(tokens, positions, samples), expected, atol=2e-5, rtol=1e-5)
    theirs.config.sliding_window = None
    assert (theirs(tokens).logits - expected).abs().max() > 0.1, "the window hides nothing"


NAMES = {"embedding": "embed_tokens", "norm": "norm"}
LAYER_NAMES = {
    "norm_1": "input_layernorm", "norm_2": "post_attention_layernorm", "attention_output": "self_attn.o_proj",
    "down": "mlp.down_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
    **{part: f"self_attn.{part}_proj" for part in "qkv"},
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_cache_gives_the_same_logits(name: str, position: str) -> None:
    options, T = VARIANTS[name]
    model = build(T, position=position, **options)
    tokens, positions, samples, _ = batch(T, 3)
    whole = model(tokens, positions, samples)
    for bounds in ([0, 1, 2, 3, 4, 9, 10, T], [0, T - 5, *range(T - 4, T + 1)], [0, T]):
        cache, parts = KVCache(T), []
        for start, stop in itertools.pairwise(bounds):
            parts.append(model(tokens[:, start:stop], positions[start:stop], samples, cache=cache))
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [1, 2, 5, 16, 100, None])
def test_a_cache_holds_what_a_later_query_sees(window: int | None) -> None:
    """The twin keeps everything and cuts; keys carry their positions, values the opposite."""
    draw = random.Random(window)
    for _ in range(20):
        capacity = draw.randint(1, 60)
        cache, at = KVCache(capacity), 0
        while at < capacity:
            T = draw.choice([1, 1, 1, draw.randint(1, capacity)])
            T = min(T, capacity - at)
            new = torch.arange(at, at + T).view(1, T, 1, 1).expand(2, T, 3, 4).float()
            k, v = cache.append(1, new, -new, window)
            first = 0 if window is None else max(0, at + 1 - window)
            assert k.shape == v.shape == (2, at + T - first, 3, 4)
            assert torch.equal(k[0, :, 0, 0], torch.arange(first, at + T).float()) and torch.equal(v, -k)
            at += T


@torch.no_grad()
def test_a_window_bounds_the_memory_of_a_cache() -> None:
    capacity, W = 400, 8
    model = build(capacity, attention_window=(W, None))
    tokens, positions, samples, _ = batch(capacity, 1)
    cache = KVCache(capacity)
    for at in (slice(0, 300), *(slice(i, i + 1) for i in range(300, 340))):
        model(tokens[:, at], positions[at], samples, cache=cache)
    held = [tensor.untyped_storage().nbytes() for tensor, _ in cache._blocks.values()]
    position = 2 * 2 * 8 * 4  # bytes: keys and values of 2 heads of width 8
    assert held == [2 * W * position, capacity * position] * 2
