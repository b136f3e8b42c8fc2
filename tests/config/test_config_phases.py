"""Phases of a run: steps and samples give each other, whatever changes on the way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.config import DataConfig, PhaseChange, RunConfig, TrainConfig
from llm.config.phases import Phase, consumed_samples, consumed_tokens
from llm.errors import InputError


def run(*changes: PhaseChange, seq_len: int = 32, batch: int = 4) -> RunConfig:
    return RunConfig(
        data=DataConfig(seq_len=seq_len, blend={"a": 1.0}, phases=changes), train=TrainConfig(global_batch_size=batch)
    )


def test_a_run_without_changes_is_one_phase():
    config = run()
    assert config.phases == (Phase(0, 0, 32, 4, {"a": 1.0}),)
    assert (consumed_samples(config.phases, 7), consumed_tokens(config.phases, 7)) == (28, 28 * 32)


def test_what_a_change_leaves_out_stays():
    config = run(
        PhaseChange(40, seq_len=64),
        PhaseChange(80, global_batch_size=8),
        PhaseChange(96, blend={"b": 2.0}),
        PhaseChange(104, seq_len=16, global_batch_size=2, blend={"a": 1.0, "b": 1.0}),
    )
    assert config.phases == (
        Phase(0, 0, 32, 4, {"a": 1.0}),
        Phase(40, 10, 64, 4, {"a": 1.0}),
        Phase(80, 20, 64, 8, {"a": 1.0}),
        Phase(96, 22, 64, 8, {"b": 2.0}),
        Phase(104, 23, 16, 2, {"a": 1.0, "b": 1.0}),
    )
    steps = [0, 9, 10, 19, 20, 21, 22, 23, 24]
    assert [consumed_samples(config.phases, step) for step in steps] == [0, 36, 40, 76, 80, 88, 96, 104, 106]
    assert consumed_tokens(config.phases, 24) == 40 * 32 + 40 * 64 + 24 * 64 + 2 * 16


@st.composite
def runs(draw: Callable) -> RunConfig:
    batch, samples, changes = draw(st.integers(1, 9)), 0, []
    first = batch
    for _ in range(draw(st.integers(0, 4))):
        samples += batch * draw(st.integers(1, 20))
        change = PhaseChange(
            samples,
            seq_len=draw(st.none() | st.integers(1, 128)),
            global_batch_size=draw(st.none() | st.integers(1, 9)),
        )
        batch = change.global_batch_size or batch
        changes.append(change)
    return run(*changes, batch=first)


@given(runs())
@settings(deadline=None)
def test_counts_are_those_of_the_steps_taken_one_by_one(config: RunConfig):
    samples = tokens = 0
    for step in range(100):
        assert (consumed_samples(config.phases, step), consumed_tokens(config.phases, step)) == (samples, tokens)
        begun = [phase for phase in config.phases if phase.first_sample <= samples]
        assert [phase for phase in config.phases if phase.first_step <= step] == begun
        samples += begun[-1].global_batch_size
        tokens += begun[-1].global_batch_size * begun[-1].seq_len


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ((40, 40), "begins at 40 samples, the one before it at 40; expected rising numbers"),
        ((40, 20), "begins at 20 samples, the one before it at 40"),
        ((39,), "begins at 39 samples, within a step of 4; use 40"),
        ((1,), "begins at 1 samples, within a step of 4; use 4"),
        ((40, 49), "begins at 49 samples, within a step of 4; use 48"),
    ],
)
def test_phases_out_of_order_or_within_a_step_are_refused(samples: tuple[int, ...], message: str):
    with pytest.raises(InputError, match=message):
        run(*(PhaseChange(number) for number in samples))
