"""The model against closed forms: its size, its first loss, causality, caching, recomputation, dropout."""

from __future__ import annotations

import math

import pytest
import torch

from kernels.rope import rope_reference
from llm.config import ModelConfig
from llm.model.cache import KVCache
from llm.model.gpt import GPT, Recompute
from llm.model.init import init_weights
from llm.model.layers import DenseLayers

VARIANTS = {
    "gpt2": dict(),
    "llama": dict(position="rope", activation="swiglu", norm="rmsnorm", bias=False, n_kv_head=2),
    "untied": dict(tie_embeddings=False, n_kv_head=1),
    "no-bias": dict(bias=False, position="rope"),
}


def build(recompute: Recompute = "none", every: int = 1, **fields) -> GPT:
    config = ModelConfig(**{"n_layer": 2, "d_model": 64, "vocab_size": 512, "max_seq_len": 32, **fields})
    model = GPT(config, DenseLayers(seed=7), recompute=recompute, recompute_every=every)
    init_weights(model, config, 3)
    return model


def batch(B: int = 3, T: int = 24, V: int = 512):
    tokens = torch.randint(0, V, (B, T + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], torch.arange(T), torch.arange(100, 100 + B), tokens[:, 1:]


def expected_first_loss(config: ModelConfig) -> float:
    """Logits of a normalised stream and a table of normal numbers are normal with variance C std^2, and so the mean of
    their log-sum-exp is ln V + C std^2 / 2; that of the target's logit is 0."""
    return math.log(config.vocab_size) + config.d_model * config.init_std**2 / 2


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("width", "std"), [(64, 0.02), (256, 0.02), (256, 0.04)])
def test_first_loss(name: str, width: int, std: float) -> None:
    model = build(**VARIANTS[name], d_model=width, init_std=std)
    tokens, positions, samples, targets = batch(16, 32)
    loss = model(tokens, positions, samples, targets) / targets.numel()
    assert abs(float(loss) - expected_first_loss(model.config)) < 0.04


@pytest.mark.slow
@torch.no_grad()
def test_first_loss_of_gpt2_124m() -> None:
    model = build(n_layer=12, n_head=12, d_model=768, vocab_size=50257, max_seq_len=128)
    assert sum(p.numel() for p in model.parameters()) == 124_439_808 - (1024 - 128) * 768
    tokens, positions, samples, targets = batch(4, 128, 50257)
    loss = model(tokens, positions, samples, targets) / targets.numel()
    assert abs(float(loss) - expected_first_loss(model.config)) < 0.05


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("std", [0.02, 0.05])
def test_initial_weights_are_spread_as_gpt2s(name: str, std: float) -> None:
    """Normal with init_std, ends of residual branches with init_std / sqrt(2 n_layer); biases 0, norms 1."""
    model = build(**VARIANTS[name], n_layer=3, d_model=256, init_std=std)
    for key, weight in model.state_dict().items():
        if weight.dim() == 1:
            assert torch.equal(weight, torch.full_like(weight, "norm" in key and key.endswith("weight"))), key
            continue
        ends_branch = "attention_output" in key or "down" in key
        expected = std / math.sqrt(6) if ends_branch else std
        # Five standard errors of a standard deviation and of a mean.
        assert abs(float(weight.std()) / expected - 1) < 5 / math.sqrt(2 * weight.numel()), key
        assert abs(float(weight.mean())) < 5 * expected / math.sqrt(weight.numel()), key


def test_number_of_parameters() -> None:
    C, F, V, T, L = 64, 256, 512, 32, 2
    block = 4 * C + (3 * C * C + 3 * C) + (C * C + C) + (C * F + F) + (F * C + C)
    assert sum(p.numel() for p in build().parameters()) == V * C + T * C + L * block + 2 * C


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_a_token_does_not_see_later_ones(name: str) -> None:
    model = build(**VARIANTS[name])
    tokens, positions, samples, _ = batch()
    changed = tokens.clone()
    changed[:, 15:] = (changed[:, 15:] + 1) % 512
    before, after = model(tokens, positions, samples), model(changed, positions, samples)
    torch.testing.assert_close(before[:, :15], after[:, :15])
    assert not torch.allclose(before[:, 15:], after[:, 15:])


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_a_cache_gives_the_same_logits(name: str) -> None:
    model = build(**VARIANTS[name])
    tokens, positions, samples, _ = batch()
    cache, parts = KVCache(24), []
    for start, stop in ((0, 10), (10, 11), (11, 24)):
        parts.append(model(tokens[:, start:stop], positions[start:stop], samples, cache=cache))
    whole = model(tokens, positions, samples)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)


def test_rotation_depends_on_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 32).unbind(0)

    def product(i: int, j: int) -> torch.Tensor:
        at = lambda x, p: rope_reference(x, torch.tensor([p]))  # noqa: E731
        return (at(q, i) * at(k, j)).sum()

    torch.testing.assert_close(product(3, 1), product(103, 101), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rope_reference(q, torch.tensor([0])), q)


def gradients(model: GPT, samples: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    tokens, positions, numbers, targets = batch()
    model(tokens, positions, numbers if samples is None else samples, targets).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("every", [1, 2])
def test_recomputation_changes_nothing(recompute: Recompute, every: int) -> None:
    kept = gradients(build(dropout=0.2))
    again = gradients(build(dropout=0.2, recompute=recompute, every=every))
    assert kept.keys() == again.keys()
    for name, grad in kept.items():
        assert torch.equal(grad, again[name]), name


def calls(recompute: Recompute, every: int, part: str) -> list[int]:
    """How often each of 4 blocks begins one of its parts in a forward and a backward pass."""
    model = build(recompute, every, n_layer=4)
    counts = [0] * 4
    for i, block in enumerate(model.blocks.values()):
        getattr(block, part).register_forward_pre_hook(lambda *_, i=i: counts.__setitem__(i, counts[i] + 1))
    gradients(model)
    return counts


def test_what_is_computed_again() -> None:
    assert calls("none", 1, "attention") == calls("none", 1, "qkv") == [1, 1, 1, 1]
    assert calls("full", 1, "attention") == calls("full", 1, "up") == [2, 2, 2, 2]
    assert calls("full", 2, "qkv") == [2, 1, 2, 1]
    assert calls("selective", 1, "attention") == [2, 2, 2, 2]
    assert calls("selective", 1, "qkv") == calls("selective", 1, "attention_output") == [1, 1, 1, 1]
    assert calls("selective", 2, "attention") == [2, 1, 2, 1]


def test_dropout_is_keyed_by_the_global_sample() -> None:
    model = build(dropout=0.2)
    tokens, positions, samples, targets = batch()
    loss = lambda rows, numbers: model(tokens[rows], positions, numbers, targets[rows])  # noqa: E731
    apart = sum(loss([i], samples[i : i + 1]) for i in range(3))
    torch.testing.assert_close(loss([0, 1, 2], samples), apart)
    assert not torch.allclose(loss([0, 1, 2], samples), loss([0, 1, 2], samples + 1))
    model.eval()
    torch.testing.assert_close(loss([0, 1, 2], samples), loss([0, 1, 2], samples + 1))


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    small, large = build(), build(n_layer=3)
    # Residual projections are scaled by depth; everything else is the same draw.
    assert torch.equal(small.blocks["1"].qkv.weight, large.blocks["1"].qkv.weight)
    assert not torch.equal(small.blocks["0"].qkv.weight, small.blocks["1"].qkv.weight)
    ratio = small.blocks["1"].down.weight / large.blocks["1"].down.weight
    torch.testing.assert_close(ratio, torch.full_like(ratio, math.sqrt(3 / 2)))
