"""What one data-parallel rank computes in a step: the NumPy twin of csrc/core/sampler.cpp, and its oracle.

Sample i sits in a corpus at a place that the schedule computes (llm/data/samples/schedule.py). A chunk at place p
covers the tokens p T .. p T + T of its corpus, both included; a packed sample is row p of the corpus's plan, then
padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llm.data.samples.documents import lay_out_pieces, scan_documents
from llm.data.samples.packing import NumpyPackPlan
from llm.data.samples.schedule import Schedule, SchedulePhase
from llm.data.tokens.shards import DamagedFile, NumpyCorpus, ShardList

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


@dataclass(frozen=True)
class Rows:
    """A micro-batch as arrays; fields as in llm.data.batch.Batch."""

    tokens: NDArray
    sample_ids: NDArray[np.int64]
    position_ids: NDArray[np.int32] | None
    cu_seqlens: NDArray[np.int32] | None
    counted: NDArray[np.uint8] | None


class NumpySampler:
    """Makes the steps of one rank."""

    skipped = 0
    """Samples so far that could not be read and were replaced."""
    replaced_targets = 0
    """By how much that has changed the targets of packed samples."""

    def __init__(
        self,
        corpora: Sequence[ShardList],
        plans: Sequence[Mapping[int, NumpyPackPlan]],
        schedule: Schedule,
        phases: Sequence[SchedulePhase],
        share: Share,
        *,
        document_masks: bool,
        skip_damaged: bool,
        widen: bool,
    ) -> None:
        """plans: of each corpus by sequence length; none: samples are chunks. widen: tokens are int64."""
        self._shards, self._plans = corpora, plans
        self._corpora = [NumpyCorpus(shards) for shards in corpora]
        self._schedule, self._phases, self._share = schedule, phases, share
        self._document_masks, self._skip_damaged, self._widen = document_masks, skip_damaged, widen

    def step(self, consumed: int) -> tuple[list[Rows], int, int]:
        """Micro-batches of the step that begins after `consumed` samples, its counted targets over all ranks, and G."""
        index = self._schedule.phase_index(consumed)
        phase, rows = self._phases[index], self._share.rows(self._phases[index])
        first = consumed + self._share.dp_rank * rows
        places = list(zip(*(column.tolist() for column in self._schedule.places(first, rows)), strict=True))
        size = self._share.micro_batch
        batches = [
            self._micro_batch(places[i : i + size], np.arange(first + i, first + i + size), index)
            for i in range(0, rows, size)
        ]
        return batches, self._targets(consumed, phase), phase.global_batch

    def _micro_batch(self, places: list[tuple[int, int, int]], sample_ids: NDArray[np.int64], phase: int) -> Rows:
        T = self._phases[phase].seq_len
        read = [self._read(corpus, position, epoch, phase) for corpus, position, epoch in places]
        tokens = np.stack([row for row, _, _ in read])
        if self._widen:
            tokens = tokens.astype(np.int64)
        if not self._document_masks:
            return Rows(tokens, sample_ids, None, None, None)
        if any(self._plans):
            position_ids, cu_seqlens, counted = lay_out_pieces([pieces for _, pieces, _ in read], T)
            return Rows(tokens, sample_ids, position_ids, cu_seqlens, counted)
        scanned = []  # row by row: corpora may tell documents apart differently
        for row, _, corpus in read:
            shards = self._shards[corpus]
            scanned.append(scan_documents(row[None], shards.eod_id, shards.eod_first))
        starts = [ends[:-1] + i * T for i, (_, ends) in enumerate(scanned)]
        cu_seqlens = np.append(np.concatenate(starts), len(read) * T).astype(np.int32)
        return Rows(tokens, sample_ids, np.concatenate([ids for ids, _ in scanned]), cu_seqlens, None)

    def _read(self, corpus: int, position: int, epoch: int, phase: int) -> tuple[NDArray, NDArray, int]:
        """(tokens [T + 1], pieces of a packed sample, corpus) of the sample there, or of the one taken instead."""
        T, planned = self._phases[phase].seq_len, position
        for tried in range(TRIES + 1):
            try:
                row = self._row(corpus, position, T)
            except DamagedFile:
                if not self._skip_damaged or tried == TRIES:
                    raise
                position = self._schedule.after(corpus, position, epoch, phase)
                continue
            if tried:
                self.skipped += 1
                self.replaced_targets += self._row_targets(corpus, position, T) - self._row_targets(corpus, planned, T)
            return row
        raise AssertionError("the last try returns or raises")

    def _row(self, corpus: int, position: int, T: int) -> tuple[NDArray, NDArray, int]:
        tokens = self._corpora[corpus]
        if not any(self._plans):
            return tokens.read(position * T, T + 1), np.empty((0, 2), np.int64), corpus
        pieces = self._plans[corpus][T].pieces(position)
        row = np.concatenate([tokens.read(start, count) for start, count in pieces.tolist()])
        padding = np.full(T + 1 - row.size, self._shards[corpus].eod_id, row.dtype)
        return np.concatenate([row, padding]), pieces, corpus

    def _targets(self, consumed: int, phase: SchedulePhase) -> int:
        if not any(self._plans):
            return phase.global_batch * phase.seq_len
        corpora, positions, _ = self._schedule.places(consumed, phase.global_batch)
        places = zip(corpora.tolist(), positions.tolist(), strict=True)
        return sum(self._row_targets(corpus, position, phase.seq_len) for corpus, position in places)

    def _row_targets(self, corpus: int, position: int, T: int) -> int:
        return self._plans[corpus][T].targets(position) if any(self._plans) else T
