"""Sampling: each cut by its closed form, the whole by statistics."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.errors import InputError
from llm.sampling import SamplingConfig, keep_top_k, keep_top_p, penalise, sample

LOGITS = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()


def draw(config: SamplingConfig, count: int = 20000, logits: torch.Tensor = LOGITS, **kw) -> list:
    """Frequencies of each id over `count` draws."""
    generator = torch.Generator().manual_seed(config.seed)
    ids = sample(logits.expand(count, -1), config, generator=generator, **kw)
    return (ids.bincount(minlength=logits.shape[-1]) / count).tolist()


def close(got: list, expected: list, count: int = 20000) -> bool:
    """Within 5 standard deviations of a binomial share."""
    pairs = zip(got, expected, strict=True)
    return all(abs(g - e) <= 5 * math.sqrt(e * (1 - e) / count) for g, e in pairs)


def test_frequencies_are_the_model_s_probabilities() -> None:
    assert close(draw(SamplingConfig()), [0.5, 0.2, 0.2, 0.1])


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_is_a_power_of_the_probabilities(temperature: float) -> None:
    powers = [p ** (1 / temperature) for p in (0.5, 0.2, 0.2, 0.1)]
    expected = [p / sum(powers) for p in powers]
    assert close(draw(SamplingConfig(temperature=temperature)), expected)


def test_temperature_zero_takes_the_likeliest() -> None:
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    config = SamplingConfig(temperature=0, top_k=3, top_p=0.1)
    assert torch.equal(sample(logits, config), logits.argmax(-1))


def test_top_k_keeps_k() -> None:
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    for k in (1, 7, 30):
        kept = keep_top_k(logits, k)
        assert (kept.isfinite().sum(-1) == k).all()
        expected = logits.sort(descending=True).values[:, :k]
        assert torch.equal(kept.sort(descending=True).values[:, :k], expected)
    assert close(draw(SamplingConfig(top_k=1)), [1, 0, 0, 0])
    assert draw(SamplingConfig(top_k=99)) == draw(SamplingConfig())


@pytest.mark.parametrize(("p", "kept"), [(0.01, 1), (0.49, 1), (0.51, 2), (0.69, 2), (0.71, 3), (0.89, 3), (0.91, 4)])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p: float, kept: int) -> None:
    assert keep_top_p(LOGITS, p).isfinite().tolist()[0] == [i < kept for i in range(4)]


def test_top_p_finds_the_likeliest_wherever_they_stand() -> None:
    shuffled = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.25, 0.1, 0.5, 0.15]]).log()
    kept = keep_top_p(shuffled, 0.7).isfinite().tolist()
    assert kept == [[False, True, False, True], [True, False, True, False]]


def test_nucleus_is_renormalised() -> None:
    assert close(draw(SamplingConfig(top_p=0.6)), [5 / 7, 2 / 7, 0, 0])


def test_repetition_penalty_makes_seen_tokens_less_likely_whatever_their_sign() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, -1.0], [2.0, -2.0, 1.0, -1.0]])
    got = penalise(logits, torch.tensor([[0, 1, 0], [2, 2, 2]]), 2.0)
    assert got.tolist() == [[1.0, -4.0, 1.0, -1.0], [2.0, -2.0, 0.5, -1.0]]
    config = SamplingConfig(temperature=0, repetition_penalty=3.0)
    assert sample(logits, config, history=torch.tensor([[0], [1]])).tolist() == [2, 0]
    assert sample(logits, config).tolist() == [0, 0]


def test_the_same_seed_draws_the_same() -> None:
    assert draw(SamplingConfig(seed=5), 100) == draw(SamplingConfig(seed=5), 100)
    assert draw(SamplingConfig(seed=5), 100) != draw(SamplingConfig(seed=6), 100)


def test_the_arguments_are_not_changed() -> None:
    logits, history = LOGITS.clone(), torch.tensor([[0]])
    config = SamplingConfig(top_k=2, top_p=0.9, repetition_penalty=1.3)
    sample(logits, config, history=history)
    assert torch.equal(logits, LOGITS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0), ("temperature", math.nan), ("temperature", math.inf),
        ("top_k", 0), ("top_p", 0.0), ("top_p", 1.5), ("top_p", math.nan),
        ("repetition_penalty", 0.0), ("repetition_penalty", math.inf), ("seed", 2**64), ("seed", -(2**63) - 1),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{field} is .*expected"):
        SamplingConfig(**{field: value})


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-45, 1e-39, 1.2e-38, 1e-30])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e30])
def test_a_tiny_temperature_takes_the_likeliest(temperature: float, scale: float) -> None:
    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)) * scale
    logits[:, 3] = -torch.inf
    assert torch.equal(sample(logits, SamplingConfig(temperature=temperature)), logits.argmax(-1))


positive = st.floats(0, exclude_min=True, allow_nan=False, allow_infinity=False)


@given(
    positive | st.just(0.0), positive, st.none() | st.integers(1, 2**70), st.floats(0, 1, exclude_min=True),
    st.integers(-(2**63), 2**64 - 1), st.sampled_from([1e-40, 1.0, 1e4, 3e38]),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_whatever_is_allowed_draws_a_token_that_can_be(
    temperature: float, penalty: float, top_k: int | None, top_p: float, seed: int, scale: float
) -> None:
    config = SamplingConfig(penalty, temperature, top_k, top_p, seed)
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(1)).clamp(-1, 1) * scale
    logits[:, [0, 4]] = -torch.inf
    generator = torch.Generator().manual_seed(config.seed)
    ids = sample(logits, config, history=torch.tensor([[1, 2], [3, 5], [6, 7], [8, 8]]), generator=generator)
    assert not set(ids.tolist()) & {0, 4}
