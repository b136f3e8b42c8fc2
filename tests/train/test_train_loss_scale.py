"""Dynamic loss scaling takes the same decisions as DeepSpeed's scaler."""

from __future__ import annotations

import random
from dataclasses import asdict

import pytest

from llm.train.loss_scale import DynamicLossScale


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch):
    from deepspeed.runtime.fp16 import loss_scaler

    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 1)
    return loss_scaler.DynamicLossScaler


@pytest.mark.parametrize("seed", range(60))
def test_the_scales_are_deepspeed_s(seed: int, theirs) -> None:
    rng = random.Random(seed)
    window, hysteresis = rng.choice([1, 2, 3, 5, 10]), rng.choice([1, 2, 3])
    share = rng.choice([0.02, 0.1, 0.3, 0.6])
    reference = theirs(2.0**16, window, 1.0, hysteresis, False)
    state = DynamicLossScale(window=window, hysteresis=hysteresis, remaining=hysteresis)
    for _ in range(300):
        overflow = rng.random() < share
        try:
            reference.update_scale(overflow)
        except Exception:  # noqa: BLE001 - they raise no narrower one
            with pytest.raises(FloatingPointError, match="smallest loss scale"):
                state.update(overflow)
            return
        state = state.update(overflow)
        assert state.scale == reference.cur_scale


def test_the_defaults_are_deepspeed_s() -> None:
    from deepspeed.runtime.precision_config import DeepSpeedFP16Config

    config, state = DeepSpeedFP16Config(enabled=True), DynamicLossScale()
    assert state.scale == 2.0**config.initial_scale_power
    assert (state.window, state.hysteresis) == (config.loss_scale_window, config.hysteresis)
    assert (state.minimum, state.remaining) == (config.min_loss_scale, config.hysteresis)


def test_a_saved_state_goes_on_where_it_was() -> None:
    state = DynamicLossScale(window=3)
    for i in range(20):
        state = state.update(i % 5 == 0)
        assert DynamicLossScale(**asdict(state)) == state
