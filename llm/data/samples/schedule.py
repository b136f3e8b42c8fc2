"""Maps a global sample number to a corpus and a position, through the phases of a run and their blends.

Sample i of a phase is the blend's sample i - first. The blend names a source, and how many of its samples come before.
Counted on from the source's first ordinal, that gives the epoch and the position in the corpus's own order.
csrc/core/schedule.cpp computes the same positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from llm.config.phases import Phase
from llm.data.samples.blend import BlendTable, shares
from llm.data.samples.order import corpus_seed, permute, sample_positions
from llm.errors import require


@dataclass(frozen=True)
class Source:
    """A corpus as one phase draws from it."""

    corpus: int
    """Its number among the run's corpora."""
    n_samples: int
    """Samples of the phase's sequence length in an epoch of it."""
    first_ordinal: int
    """Samples of its order that earlier phases have passed."""


@dataclass(frozen=True)
class SchedulePhase:
    """A part of the run in which nothing changes, with what it draws from."""

    first_sample: int
    global_batch: int
    seq_len: int
    sources: tuple[Source, ...]
    shares: tuple[int, ...]
    """Of the sources in 2^16 samples."""


class Curriculum:
    """What a run draws from each of its corpora, phase by phase."""

    def __init__(
        self,
        phases: Sequence[Phase],
        blends: Sequence[Mapping[str, float]],
        n_samples: Callable[[str, int], int],
        table: Callable[[Sequence[int]], BlendTable] = BlendTable,
    ):
        """Lay out a run.

        blends: of each phase, the weights of its corpora. n_samples(corpus, seq_len): samples in an epoch.
        table: the form of BlendTable that is used. Raises InputError for a corpus without a sample of a phase's length.
        """
        self._table = cache(table)
        self.names = corpus_names(blends)
        """The corpora by their numbers."""
        self.phases: tuple[SchedulePhase, ...] = ()
        """What `Schedule` and `_native.Schedule` are made of."""
        numbers = {name: number for number, name in enumerate(self.names)}
        for phase, blend in zip(phases, blends, strict=True):
            passed = {  # of a corpus that several phases had, the last
                source.corpus: (last, source, drawn) for last, source, drawn in self._drawn(phase.first_sample)
            }
            sources = []
            for name in blend:
                corpus, n = numbers[name], n_samples(name, phase.seq_len)
                require(
                    n >= 1, f"{name} has no sample of data.seq_len {phase.seq_len}; use more text or shorter samples"
                )
                sources.append(Source(corpus, n, _first_ordinal(passed.get(corpus), phase.seq_len, n)))
            batch, weights = phase.global_batch_size, list(blend.values())
            self.phases += (SchedulePhase(phase.first_sample, batch, phase.seq_len, tuple(sources), shares(weights)),)

    def epochs(self, sample: int) -> dict[str, float]:
        """How often the first `sample` samples of the run have gone through each corpus."""
        out = dict.fromkeys(self.names, 0.0)
        for _, source, drawn in self._drawn(sample):
            out[self.names[source.corpus]] += drawn / source.n_samples
        return out

    def _drawn(self, sample: int) -> Iterator[tuple[SchedulePhase, Source, int]]:
        """Each source of each phase that begins before `sample`, with the samples drawn from it until then."""
        ends = [*(phase.first_sample for phase in self.phases[1:]), sample]
        for phase, end in zip(self.phases, ends, strict=False):
            n = min(end, sample) - phase.first_sample
            if n > 0:
                for i, source in enumerate(phase.sources):
                    yield phase, source, self._table(phase.shares).count(i, n) if len(phase.sources) > 1 else n


def corpus_names(blends: Iterable[Mapping[str, float]]) -> tuple[str, ...]:
    """The training corpora by their numbers, which a phase added later does not change."""
    return tuple(dict.fromkeys(name for blend in blends for name in blend))


def _first_ordinal(passed: tuple[SchedulePhase, Source, int] | None, seq_len: int, n_samples: int) -> int:
    """Where a phase begins in the order of a corpus: `passed` is the last phase that had it and what that drew.

    Samples of the same length go on, so that none repeats before the epoch is over; others begin a new epoch.
    """
    if passed is None:
        return 0
    phase, source, drawn = passed
    ordinal = source.first_ordinal + drawn
    return ordinal if phase.seq_len == seq_len else -(-ordinal // source.n_samples) * n_samples


class Schedule:
    """The twin of `_native.Schedule`."""

    def __init__(self, seed: int, phases: Sequence[SchedulePhase]):
        self._seed, self._phases = seed, tuple(phases)
        self._tables = {phase.shares: BlendTable(phase.shares) for phase in phases}

    def phase_index(self, sample: int) -> int:
        """The number of the phase that a sample belongs to."""
        require(sample >= 0, f"the sample number is {sample}; expected at least 0")
        return sum(phase.first_sample <= sample for phase in self._phases) - 1

    def locate(self, first: int, count: int) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
        """Where the samples first .. first + count - 1 lie: (corpus, position in samples, epoch), each [count].

        Raises InputError where they lie in several phases.
        """
        index = self.phase_index(first)
        together = count == 0 or self.phase_index(first + count - 1) == index
        require(together, f"samples {first} to {first + count - 1} lie in several phases")
        phase = self._phases[index]
        which, ordinals = self._tables[phase.shares].entries(first - phase.first_sample, count)
        corpora, positions, epochs = np.empty(count, np.int32), np.empty(count, np.int64), np.empty(count, np.int64)
        for i in np.unique(which):
            source, slots = phase.sources[i], np.flatnonzero(which == i)  # in its order, none left out
            ordinal = source.first_ordinal + int(ordinals[slots[0]])
            seed = corpus_seed(self._seed, source.corpus)
            corpora[slots] = source.corpus
            positions[slots] = sample_positions(seed, source.n_samples, ordinal, slots.size)
            epochs[slots] = (ordinal + np.arange(slots.size)) // source.n_samples
        return corpora, positions, epochs

    def after(self, corpus: int, position: int, epoch: int, phase: int) -> int:
        """The position that is read instead of one that cannot be: the epoch's permutation applied to it once more."""
        source = next(source for source in self._phases[phase].sources if source.corpus == corpus)
        return int(permute(np.array([position]), corpus_seed(self._seed, corpus), epoch, source.n_samples)[0])
