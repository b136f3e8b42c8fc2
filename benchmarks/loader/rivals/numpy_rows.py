"""The most that plain Python does: whole rows of a mapped file into one buffer, without a loader around it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.loader.system import Batch, Batches, Job, System
from benchmarks.loader.tokens import TokenSet


class NumpyRows(System):
    """A shuffled order in memory, one file."""

    def open(self, tokens: TokenSet, job: Job, state: Any = None) -> Batches:
        T, ids = job.seq_len, tokens.read(0)
        order = np.random.default_rng(0).permutation((tokens.tokens - 1) // T)
        wide = torch.empty(job.rows, T + 1, dtype=torch.int64)
        rows = wide.numpy()
        begin = state or 0
        while True:
            for first in range(begin, order.size - job.rows + 1, job.rows):
                for row, place in zip(rows, order[first : first + job.rows] * T, strict=True):
                    row[:] = ids[place : place + T + 1]
                batch = Batch(wide[:, :-1], wide[:, 1:])
                yield batch._replace(**documents(rows[:, :-1], tokens.eod_id)) if job.documents else batch
            begin = 0


def documents(inputs: NDArray, eod_id: int) -> dict[str, torch.Tensor]:
    """Position ids [B, T] int32 and cu_seqlens of inputs whose documents end with the token `eod_id`."""
    B, T = inputs.shape
    places = np.arange(T, dtype=np.int32)
    starts = np.zeros((B, T), np.int32)  # of the document that a place lies in
    starts[:, 1:] = np.where(inputs[:, :-1] == eod_id, places[1:], 0)
    position_ids = places - np.maximum.accumulate(starts, axis=1)
    cu_seqlens = np.append(np.flatnonzero(position_ids == 0), B * T).astype(np.int32)
    return {"position_ids": torch.from_numpy(position_ids), "cu_seqlens": torch.from_numpy(cu_seqlens)}
