"""A run far from compute-optimal says so, and a plan's tokens and hours are the config's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from llm.config import ModelConfig, PhaseChange, RunConfig
from llm.plan.budget import far_off, optimal_tokens, tokens_per_parameter
from llm.plan.flops import flops_per_token
from llm.plan.memory import parameters
from llm.plan.summary import summary, table

N = parameters(RunConfig().model)
LARGE = RunConfig(model=ModelConfig(n_layer=32, n_head=32, d_model=4096, vocab_size=32000))


def run(ratio: float, config: RunConfig = LARGE, **train: Any) -> RunConfig:
    """On so many tokens per parameter."""
    steps = round(ratio * parameters(config.model) / (32 * 128))
    return replace(config, train=replace(config.train, max_steps=steps, **train))


@pytest.mark.parametrize(("ratio", "word"), [(0.1, "warning"), (1.9, "warning"), (201, "note"), (5000, "note")])
def test_what_is_far_off_is_told(ratio: float, word: str) -> None:
    told = far_off(run(ratio))
    assert told is not None and told.startswith(f"{word}: the run trains on {ratio:,.3g} tokens per parameter")
    assert far_off(run(ratio, init_from="runs/other")) is None  # it had others before
    assert far_off(run(ratio, RunConfig())) is None  # a trial


@pytest.mark.parametrize("ratio", [2.1, 20, 148, 199])
def test_what_is_usual_is_not(ratio: float) -> None:
    assert far_off(run(ratio)) is None


def test_tokens_follow_the_phases() -> None:
    config = RunConfig()
    config = replace(config, data=replace(config.data, phases=(PhaseChange(samples=320, seq_len=64),)))
    tokens = 10 * 32 * 128 + 990 * 32 * 64
    assert tokens_per_parameter(config) == tokens / N and optimal_tokens(config.model) == 20 * N
    (line,) = (line for line in lines(config) if line.startswith("tokens"))
    assert f"{tokens:,} in 1,000 steps" in line


def lines(config: RunConfig, gpus: int = 2, epochs: dict[str, float] | None = None) -> list[str]:
    return list(summary(config, gpus, mfu=0.5, peak_tflops=100.0, epochs=epochs))


def test_hours_are_the_work_over_the_rate() -> None:
    config = RunConfig()
    work = 1000 * 32 * 128 * flops_per_token(config.model, 128, "non-causal")
    hours = work / (2 * 0.5 * 100e12) / 3600
    assert f"{hours:,.3g} hours at 50% MFU (non-causal) of 100 TFLOP/s per GPU" in lines(config)[-1]
    assert lines(config, gpus=1)[0].startswith(
        "run on 1 GPU: deepspeed, fp32, ZeRO 0, TP 1, DP 1, 2 micro-batches of 16"
    )


def test_epochs_are_told_where_the_data_is_prepared() -> None:
    told = [line for line in lines(RunConfig(), epochs={"data/a": 0.5, "data/b": 3744.1}) if line.startswith("epochs")]
    assert told == ["epochs      0.5 of data/a", "epochs      3.74e+03 of data/b"]


def test_columns_are_aligned() -> None:
    assert table([["a", "1", "2"], ["bcd", "10", ""]]) == ["a     1  2", "bcd  10"]
