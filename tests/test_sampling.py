"""Sampling: each cut by its closed form, the whole by statistics."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.errors import InputError
from llm.sampling import SamplingConfig, ban_repeats, discourage, keep_min_p, keep_top_k, keep_top_p, penalise, sample

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
        ("min_p", 1.5), ("min_p", -0.1), ("presence_penalty", math.nan), ("frequency_penalty", 101.0),
        ("no_repeat_ngram", 0), ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf), ("seed", 2**64), ("seed", -(2**63) - 1),
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


def test_draws_follow_the_distribution() -> None:
    """Pearson's chi-squared over 16 tokens, drawn with every cut and penalty: below the 99.9th percentile."""
    logits = torch.randn(1, 16, generator=torch.Generator().manual_seed(2))
    config = SamplingConfig(1.2, 0.8, 12, 0.95, seed=7, min_p=0.02, presence_penalty=0.3, frequency_penalty=0.1)
    history, count = torch.tensor([[3, 3, 5, 1]]), 50000
    expected = logits[0].tolist()
    for i in {3, 5, 1}:
        expected[i] = expected[i] / 1.2 if expected[i] > 0 else expected[i] * 1.2
        expected[i] -= 0.3 + 0.1 * history[0].tolist().count(i)
    weights = [math.exp(x / 0.8) for x in expected]
    order = sorted(range(16), key=lambda i: -weights[i])[:12]
    before, kept = 0.0, list[int]()
    for i in order:
        if before < 0.95 * sum(weights[j] for j in order) and weights[i] >= 0.02 * weights[order[0]]:
            kept.append(i)
        before += weights[i]
    found = draw(config, count, logits, history=history.expand(count, -1))
    assert {i for i, share in enumerate(found) if share} <= {*kept} and len(kept) > 5
    shares = [weights[i] / sum(weights[j] for j in kept) for i in kept]
    chi_squared = sum(count * (found[i] - p) ** 2 / p for i, p in zip(kept, shares, strict=True))
    assert chi_squared < len(kept) - 1 + 3.1 * math.sqrt(2 * (len(kept) - 1)) + 6, chi_squared


tokens = st.lists(st.integers(0, 4), min_size=1, max_size=14)


@given(tokens, st.integers(1, 5))
@settings(deadline=None)
def test_no_run_of_tokens_comes_twice(history: list[int], n: int) -> None:
    if n > len(history):
        return
    logits = torch.zeros(1, 6)
    found = ban_repeats(logits, torch.tensor([history]), n)[0].tolist()
    runs = {tuple(history[i : i + n]) for i in range(len(history) - n + 1)}
    expected = [tuple([*history, token][-n:]) in runs for token in range(6)]
    assert [x == -math.inf for x in found] == expected
    config = SamplingConfig(temperature=0, no_repeat_ngram=n)
    assert not expected[sample(logits, config, history=torch.tensor([history])).item()]


def test_a_row_without_another_token_may_repeat() -> None:
    logits = torch.tensor([[1.0, 2.0, -math.inf]])
    assert ban_repeats(logits, torch.tensor([[0, 1]]), 1).tolist() == logits.tolist()
    assert ban_repeats(logits, torch.tensor([[1]]), 1).tolist() == [[1.0, -math.inf, -math.inf]]


@given(st.lists(st.floats(-20, 20), min_size=2, max_size=9), st.floats(0.001, 1))
@settings(deadline=None)
def test_min_p_keeps_what_has_that_share_of_the_likeliest(logits: list[float], p: float) -> None:
    probabilities = [math.exp(x - max(logits)) for x in logits]
    kept = keep_min_p(torch.tensor([logits]), p).isfinite().tolist()[0]
    for probability, stays in zip(probabilities, kept, strict=True):
        assert stays == (probability >= p) or abs(probability / p - 1) < 1e-4


@given(tokens, st.integers(0, 14), st.floats(-3, 3), st.floats(-3, 3))
@settings(deadline=None)
def test_presence_and_frequency_count_what_was_drawn(
    history: list[int], begins: int, presence: float, frequency: float
) -> None:
    logits = torch.zeros(1, 6)
    config = SamplingConfig(temperature=0, presence_penalty=presence, frequency_penalty=frequency)
    drawn = history[begins:]
    expected = [-presence * (i in drawn) - frequency * drawn.count(i) for i in range(6)]
    options = {"history": torch.tensor([history]), "begins": torch.tensor([[begins]])}
    assert discourage(logits, config, **options)[0].tolist() == pytest.approx(expected, abs=1e-5)
    assert expected[sample(logits, config, **options).item()] == pytest.approx(max(expected), abs=1e-5)
