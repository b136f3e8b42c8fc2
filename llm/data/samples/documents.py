"""Finds where documents begin in samples, with NumPy. csrc/core/documents.cpp does the same.

Position ids count from 0 in every document. cu_seqlens lists where the documents of a micro-batch
of B samples begin in its B * T inputs laid end to end, then B * T. A sample always begins one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def scan_documents(
    tokens: NDArray[np.integer], eod_id: int, eod_first: bool
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """position_ids [B, T] and cu_seqlens of samples [B, T + 1] cut from the stream.

    The token `eod_id` is the last of its document, or the first (eod_first).
    """
    begins = np.ones((tokens.shape[0], tokens.shape[1] - 1), bool)
    begins[:, 1:] = (tokens[:, 1:-1] if eod_first else tokens[:, :-2]) == eod_id
    return number_documents(begins)


def lay_out_pieces(
    rows: Sequence[NDArray[np.int64]], seq_len: int
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.uint8]]:
    """position_ids [B, T], cu_seqlens and counted [B, T] of packed samples.

    Each row is its pieces [n, 2] (first token, tokens), which lie one after another in its T + 1
    slots; padding after them is a document of its own. counted[t] is 0 where slot t + 1, the target
    of input t, begins a piece or is padding: nothing before it tells what it is.
    """
    begins, padding = np.zeros((2, len(rows), seq_len + 1), bool)
    for row, pieces in enumerate(rows):
        ends = pieces[:, 1].cumsum()
        begins[row, 0] = True
        begins[row, ends[ends <= seq_len]] = True  # of the next piece, or of the padding
        padding[row, ends[-1] :] = True
    counted = ~(begins | padding)[:, 1:]
    return *number_documents(begins[:, :-1]), counted.astype(np.uint8)


def number_documents(begins: NDArray[np.bool_]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """position_ids [B, T] and cu_seqlens of rows whose documents begin where `begins` [B, T] says."""
    slots = np.arange(begins.shape[1], dtype=np.int32)
    last_begin = np.maximum.accumulate(np.where(begins, slots, 0), axis=1)
    cu_seqlens = np.append(np.flatnonzero(begins), begins.size).astype(np.int32)
    return slots - last_begin, cu_seqlens
