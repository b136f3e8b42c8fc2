"""Assembles the samples of one data-parallel rank's step with NumPy: the reference for csrc/core/sampler.cpp.

The schedule gives a sample's corpus and its position p in it (llm/data/samples/schedule.py). A chunk at position p has
the tokens p T .. p T + T of its corpus, both included; a packed sample is row p of its plan, then padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llm.data.batch import Batch, Loader, Step, batch_of
from llm.data.samples.documents import lay_out_pieces, scan_documents
from llm.data.samples.packing import NumpyPackPlan
from llm.data.samples.schedule import Curriculum, Schedule, SchedulePhase
from llm.data.tokens.shards import NumpyCorpus, ShardList
from llm.errors import DamagedFile

TRIES = 1000  # samples tried for one that cannot be read


@dataclass(frozen=True)
class Share:
    """Which samples of each step are a rank's: the dp_rank-th of dp_size equal slices, in micro-batches."""

    dp_rank: int
    dp_size: int
    micro_batch: int

    def rows(self, phase: SchedulePhase) -> int:
        """Samples of a step on this rank."""
        return phase.global_batch // self.dp_size


class Sample(NamedTuple):
    """A sample as it was read."""

    corpus: int
    tokens: NDArray
    """[T + 1]."""
    pieces: NDArray[np.int64]
    """[n, 2] (first token in the corpus, tokens) of a packed sample."""
    replaces: bool = False
    """Another one could not be read."""
    replaced_targets: int = 0
    """Its targets less those of that one."""


class NumpyLoader(Loader):
    """The plain loader: the native one's twin and oracle."""

    def __init__(
        self,
        corpora: Sequence[ShardList],
        curriculum: Curriculum,
        share: Share,
        seed: int,
        consumed: int,
        *,
        packed: bool,
        document_masks: bool,
        skip_damaged: bool,
        widen: bool,
    ) -> None:
        """widen: tokens are int64."""
        super().__init__(curriculum, consumed)
        self._shards, self._packed = corpora, packed
        self._corpora = [NumpyCorpus(shards) for shards in corpora]
        self._plans = [
            {T: NumpyPackPlan(Path(path), T, shards.n_tokens) for T, path in shards.plans.items() if packed}
            for shards in corpora
        ]
        self._schedule, self._phases, self._share = Schedule(seed, curriculum.phases), curriculum.phases, share
        self._document_masks, self._skip_damaged, self._widen = document_masks, skip_damaged, widen

    def _assemble(self) -> tuple[Step, int]:
        index = self._schedule.phase_index(self.consumed)
        phase, rows = self._phases[index], self._share.rows(self._phases[index])
        first = self.consumed + self._share.dp_rank * rows
        corpora, positions, epochs = (column.tolist() for column in self._schedule.locate(first, rows))
        samples = [self._read(*place, index) for place in zip(corpora, positions, epochs, strict=True)]
        size = self._share.micro_batch
        batches = [
            self._batch(samples[i : i + size], np.arange(first + i, first + i + size), phase.seq_len)
            for i in range(0, rows, size)
        ]
        skipped = sum(sample.replaces for sample in samples) if self._skip_damaged else None
        changed = sum(sample.replaced_targets for sample in samples) if self._skip_damaged and self._packed else None
        return Step(batches, self._targets(phase), skipped, changed), phase.global_batch

    def _batch(self, samples: Sequence[Sample], sample_ids: NDArray[np.int64], T: int) -> Batch:
        tokens = np.stack([sample.tokens for sample in samples], dtype=np.int64 if self._widen else None)
        if not self._document_masks:
            return batch_of(tokens, sample_ids)
        if self._packed:
            return batch_of(tokens, sample_ids, *lay_out_pieces([sample.pieces for sample in samples], T))
        scanned = []  # row by row: corpora may tell documents apart differently
        for sample in samples:
            shards = self._shards[sample.corpus]
            scanned.append(scan_documents(sample.tokens[None], shards.eod_id, shards.eod_first))
        starts = [ends[:-1] + i * T for i, (_, ends) in enumerate(scanned)]
        cu_seqlens = np.append(np.concatenate(starts), len(samples) * T).astype(np.int32)
        return batch_of(tokens, sample_ids, np.concatenate([ids for ids, _ in scanned]), cu_seqlens)

    def _read(self, corpus: int, position: int, epoch: int, phase: int) -> Sample:
        """The sample at a place, or the one taken instead of it."""
        T, planned, tried = self._phases[phase].seq_len, position, 0
        while True:
            try:
                sample = self._sample(corpus, position, T)
                break
            except DamagedFile:
                if not self._skip_damaged or tried == TRIES:
                    raise
                position = self._schedule.after(corpus, position, epoch, phase)
                tried += 1
        if not tried:
            return sample
        change = self._row_targets(corpus, position, T) - self._row_targets(corpus, planned, T)
        return sample._replace(replaces=True, replaced_targets=change)

    def _sample(self, corpus: int, position: int, T: int) -> Sample:
        tokens = self._corpora[corpus]
        if not self._packed:
            return Sample(corpus, tokens.read(position * T, T + 1), np.empty((0, 2), np.int64))
        pieces = self._plans[corpus][T].pieces(position)
        row = np.concatenate([tokens.read(start, count) for start, count in pieces.tolist()])
        padding = np.full(T + 1 - row.size, self._shards[corpus].eod_id, row.dtype)
        return Sample(corpus, np.concatenate([row, padding]), pieces)

    def _targets(self, phase: SchedulePhase) -> int:
        """Targets of a step over all ranks that count, as planned."""
        if not self._packed:
            return phase.global_batch * phase.seq_len
        corpora, positions, _ = self._schedule.locate(self.consumed, phase.global_batch)
        places = zip(corpora.tolist(), positions.tolist(), strict=True)
        return sum(self._row_targets(corpus, position, phase.seq_len) for corpus, position in places)

    def _row_targets(self, corpus: int, position: int, T: int) -> int:
        return self._plans[corpus][T].targets(position) if self._packed else T
