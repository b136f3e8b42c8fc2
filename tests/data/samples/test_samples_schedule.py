"""Samples through phases and blends: the same in C++ and NumPy, within their shares, none twice in an epoch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.config import DataConfig, ModelConfig, PhaseChange, RunConfig, TrainConfig
from llm.data import _native
from llm.data.corpora import blends_of
from llm.data.samples.blend import PERIOD
from llm.data.samples.order import corpus_seed, sample_positions
from llm.data.samples.schedule import Curriculum, Schedule, SchedulePhase, Source, corpus_names
from llm.errors import InputError

TOKENS = {"a": 9001, "b": 2300, "c": 501, "d": 70_000}
SEED = 77


def n_samples(corpus: str, seq_len: int) -> int:
    return (TOKENS[corpus] - 1) // seq_len


def run(phases: list[dict[str, Any]]) -> RunConfig:
    """The config of these phases: each has samples, seq_len, global_batch_size and blend, as data.phases has them."""
    first, later = phases[0], tuple(PhaseChange(**phase) for phase in phases[1:])
    return RunConfig(
        data=DataConfig(seq_len=first["seq_len"], blend=first["blend"], phases=later),
        train=TrainConfig(global_batch_size=first["global_batch_size"]),
    )


def lay_out(config: RunConfig, samples: Callable[[str, int], int] = n_samples, *table: Any) -> Curriculum:
    return Curriculum(config.phases, blends_of(config), samples, *table)


BLENDS = st.dictionaries(st.sampled_from(sorted(TOKENS)), st.floats(0.01, 10), min_size=1)


@st.composite
def runs(draw: Callable, lengths: tuple[int, ...] = (32, 64, 100)) -> tuple[Curriculum, int]:
    """A run of up to four phases, and how many samples it has; epochs of the small corpora end within it."""
    phases, samples = [], 0
    for _ in range(draw(st.integers(1, 4))):
        phase = {
            "samples": samples,
            "seq_len": draw(st.sampled_from(lengths)),
            "global_batch_size": draw(st.sampled_from([1, 3, 8])),
            "blend": draw(BLENDS),
        }
        samples += phase["global_batch_size"] * draw(st.integers(1, 60))
        phases.append(phase)
    return lay_out(run(phases), n_samples, _native.BlendTable), samples


def places(curriculum: Curriculum, samples: int, form: type = _native.Schedule) -> list[np.ndarray]:
    """(corpus, position, epoch, phase) of the first samples of the run, each [samples]."""
    phases, schedule = curriculum.phases, form(SEED, curriculum.phases)
    ends = [*(phase.first_sample for phase in phases[1:]), samples]
    parts = [
        (*schedule.locate(phase.first_sample, end - phase.first_sample), np.full(end - phase.first_sample, i))
        for i, (phase, end) in enumerate(zip(phases, ends, strict=True))
    ]
    return [np.concatenate(columns) for columns in zip(*parts, strict=True)]


@given(runs(), st.data())
@settings(max_examples=20, deadline=None)
def test_native_and_numpy_agree_wherever_they_begin(drawn: tuple[Curriculum, int], data: st.DataObject):
    curriculum, samples = drawn
    phases = curriculum.phases
    whole = places(curriculum, samples, Schedule)
    first = data.draw(st.integers(0, samples - 1))
    index = int(whole[3][first])
    end = phases[index + 1].first_sample if index + 1 < len(phases) else samples
    count = data.draw(st.integers(0, end - first))
    after = []
    for form in (Schedule, _native.Schedule):
        schedule = form(SEED, phases)
        assert schedule.phase_index(first) == index
        for part, all_of_it in zip(schedule.locate(first, count), whole, strict=False):
            assert part.dtype == all_of_it.dtype and np.array_equal(part, all_of_it[first : first + count])
        after.append(schedule.after(*(int(column[first]) for column in whole)))
    assert after[0] == after[1]


@given(runs())
@settings(max_examples=60, deadline=None)
def test_nothing_repeats_in_an_epoch_and_none_mixes_lengths(drawn: tuple[Curriculum, int]):
    curriculum, samples = drawn
    seen: dict[tuple[int, int], list[int]] = defaultdict(list)
    lengths: dict[tuple[int, int], set[int]] = defaultdict(set)
    for corpus, position, epoch, phase in zip(*places(curriculum, samples), strict=True):
        seen[corpus, epoch].append(position)
        lengths[corpus, epoch].add(curriculum.phases[phase].seq_len)
    for (corpus, epoch), positions in seen.items():
        assert len(lengths[corpus, epoch]) == 1
        n = n_samples(curriculum.names[corpus], *lengths[corpus, epoch])
        assert len(set(positions)) == len(positions) and all(0 <= position < n for position in positions)


@given(runs(lengths=(100,)))
@settings(max_examples=60, deadline=None)
def test_phases_of_one_length_read_every_epoch_to_its_end(drawn: tuple[Curriculum, int]):
    """As if each corpus were read alone: what the phases draw from it, joined, is its own order."""
    curriculum, samples = drawn
    corpora, positions, epochs, _ = places(curriculum, samples)
    for number, name in enumerate(curriculum.names):
        found, n = positions[corpora == number], n_samples(name, 100)
        assert np.array_equal(found, sample_positions(corpus_seed(SEED, number), n, 0, found.size))
        assert np.array_equal(epochs[corpora == number], np.arange(found.size) // n)


@given(runs())
@settings(max_examples=40, deadline=None)
def test_in_every_phase_each_corpus_keeps_its_share(drawn: tuple[Curriculum, int]):
    curriculum, samples = drawn
    corpora, _, _, index = places(curriculum, samples)
    for i, phase in enumerate(curriculum.phases):
        n, of_phase = len(phase.sources), corpora[index == i]
        assert set(of_phase) <= {source.corpus for source in phase.sources}
        for source, share in zip(phase.sources, phase.shares, strict=True):
            fair = np.arange(1, of_phase.size + 1) * share
            worst = np.abs(np.cumsum(of_phase == source.corpus) * PERIOD - fair).max()
            assert Fraction(int(worst), PERIOD) <= (1 - Fraction(1, 2 * n - 2) if n > 1 else 0)


@given(runs(), st.data())
@settings(max_examples=40, deadline=None)
def test_what_was_drawn_is_counted(drawn: tuple[Curriculum, int], data: st.DataObject):
    curriculum, samples = drawn
    corpora, _, _, index = places(curriculum, samples)
    end = data.draw(st.integers(0, samples))
    epochs = curriculum.epochs(end)
    assert tuple(epochs) == curriculum.names
    for number, name in enumerate(curriculum.names):
        lengths = [curriculum.phases[i].seq_len for i in index[:end][corpora[:end] == number]]
        assert epochs[name] == pytest.approx(sum(1 / n_samples(name, length) for length in lengths))


def test_one_corpus_alone_is_the_plain_order():
    config = RunConfig(data=DataConfig(path="a", seq_len=32))
    phases = lay_out(config).phases
    expected = sample_positions(SEED, n_samples("a", 32), 250, 700)
    for schedule in (Schedule(SEED, phases), _native.Schedule(SEED, phases)):
        corpora, positions, epochs = schedule.locate(250, 700)
        assert not corpora.any() and np.array_equal(positions, expected)
        assert np.array_equal(epochs, np.arange(250, 950) // n_samples("a", 32))


def test_each_corpus_has_its_own_order():
    """Two corpora of one size are not read in step."""
    phase = SchedulePhase(0, 2, 8, (Source(0, 500, 0), Source(3, 500, 0)), (32768, 32768))
    corpora, positions, _ = Schedule(SEED, [phase]).locate(0, 1000)
    for corpus in (0, 3):
        assert np.array_equal(positions[corpora == corpus], sample_positions(corpus_seed(SEED, corpus), 500, 0, 500))
    assert (positions[corpora == 0] == positions[corpora == 3]).mean() < 0.05


def test_phases_by_hand():
    config = run(
        [
            {"samples": 0, "seq_len": 100, "global_batch_size": 4, "blend": {"c": 1, "b": 1}},
            {"samples": 16, "blend": {"c": 1}},  # 8 of 5 drawn: in the second epoch, and on in it
            {"samples": 20, "seq_len": 50, "global_batch_size": 5},  # 12 of 5 drawn: 3 epochs begun, of 10 samples now
            {"samples": 25, "seq_len": 100, "blend": {"b": 1, "c": 3}},  # b goes on, c begins its fifth epoch
        ]
    )
    first, second, third, fourth = lay_out(config).phases
    assert first == SchedulePhase(0, 4, 100, (Source(0, 22, 0), Source(1, 5, 0)), (32768, 32768))
    assert second == SchedulePhase(16, 4, 100, (Source(1, 5, 8),), (65536,))
    assert third == SchedulePhase(20, 5, 50, (Source(1, 10, 30),), (65536,))
    assert fourth == SchedulePhase(25, 5, 100, (Source(0, 22, 8), Source(1, 5, 20)), (16384, 49152))


def test_numbers_of_corpora_depend_neither_on_the_order_of_keys_nor_on_later_phases():
    first = {"samples": 0, "seq_len": 32, "global_batch_size": 2, "blend": {"c": 1, "b": 2}}
    swapped = {**first, "blend": {"b": 2, "c": 1}}
    assert corpus_names(blends_of(run([first]))) == corpus_names(blends_of(run([swapped]))) == ("b", "c")
    assert lay_out(run([first])).phases == lay_out(run([swapped])).phases
    longer = run([first, {"samples": 20, "blend": {"a": 1, "c": 1}}])
    assert corpus_names(blends_of(longer)) == ("b", "c", "a")
    assert lay_out(longer).phases[:1] == lay_out(run([first])).phases


def test_a_run_without_a_blend_reads_the_prepared_folder():
    assert corpus_names(blends_of(RunConfig(data=DataConfig(path="./x/y")))) == ("./x/y",)
    assert corpus_names(blends_of(RunConfig(model=ModelConfig(vocab_size=300)))) == ("data/stdlib-300",)
    blended_later = DataConfig(path="a", phases=(PhaseChange(32, blend={"a": 1, "b": 1}),))
    assert corpus_names(blends_of(RunConfig(data=blended_later))) == ("a", "b")


def test_a_corpus_without_a_sample_is_named():
    config = run([{"samples": 0, "seq_len": 128, "global_batch_size": 1, "blend": {"a": 1, "c": 1}}])
    with pytest.raises(InputError, match="c has no sample of data\\.seq_len 128"):
        lay_out(config, lambda corpus, seq_len: {"a": 70, "c": 0}[corpus])


def test_the_place_after_walks_through_the_epoch_s_permutation():
    phase = SchedulePhase(0, 1, 8, (Source(2, 40, 0), Source(5, 300, 0)), (10_000, 55_536))
    schedule = Schedule(SEED, [phase])
    permutation = sample_positions(corpus_seed(SEED, 5), 300, 900, 300)
    for form in (schedule, _native.Schedule(SEED, [phase])):
        assert [form.after(5, i, 3, 0) for i in range(300)] == permutation.tolist()
    for bad in [(0, 0, 0, 0), (5, 300, 0, 0), (5, -1, 0, 0), (5, 0, 0, 1)]:
        with pytest.raises(IndexError):
            _native.Schedule(SEED, [phase]).after(*bad)


PHASE = SchedulePhase(0, 4, 8, (Source(0, 50, 0), Source(1, 60, 0)), (32768, 32768))


def test_samples_of_several_phases_and_impossible_ones_are_refused():
    phases = [PHASE, replace(PHASE, first_sample=40)]
    for form, error in ((Schedule, InputError), (_native.Schedule, (ValueError, IndexError))):
        schedule = form(SEED, phases)
        assert [part.size for part in schedule.locate(39, 1)] == [1, 1, 1]
        assert [part.size for part in schedule.locate(39, 0)] == [0, 0, 0]
        with pytest.raises(error, match="samples 39 to 40 lie in several phases"):
            schedule.locate(39, 2)
        with pytest.raises(error):
            schedule.locate(-1, 1)
    with pytest.raises(IndexError, match="below 2\\^63"):
        _native.Schedule(SEED, phases).locate(2**63 - 2, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first_sample": 3}, "begins at sample 3, expected 0"),
        ({"global_batch": 0}, "global_batch >= 1"),
        ({"seq_len": 0}, "seq_len >= 1"),
        ({"sources": PHASE.sources[:1]}, "1 sources and 2 shares"),
        ({"sources": PHASE.sources[:1] * 2}, "twice in one phase"),
        ({"sources": (Source(0, 0, 0), PHASE.sources[1])}, "between 1 and 2\\^62"),
        ({"sources": (Source(-1, 5, 0), PHASE.sources[1])}, "negative"),
        ({"sources": (Source(0, 5, 2**63), PHASE.sources[1])}, "first_ordinal"),
        ({"shares": (1, 2)}, "sum to 3"),
        ({"sources": (), "shares": ()}, "sum to 0"),
    ],
)
def test_phases_that_are_none_are_refused(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        _native.Schedule(SEED, [replace(PHASE, **change)])


def test_phases_out_of_order_or_none_are_refused():
    with pytest.raises(ValueError, match="at least one phase"):
        _native.Schedule(SEED, [])
    with pytest.raises(ValueError, match="begins at sample 0, the one before it at 0"):
        _native.Schedule(SEED, [PHASE, PHASE])
