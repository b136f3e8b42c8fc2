"""Checks a loader's batches: they must hold the tokens of the corpus, each as often as promised.

The ids of the corpus give their positions (TokenSet.kind distinct), so a row shows where it comes from.
"""

from collections.abc import Iterator
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from benchmarks.loader.cases import Case
from benchmarks.loader.system import Batch
from benchmarks.loader.tokens import DISTINCT_FROM, TokenSet


def check(kind: str, tokens: TokenSet, case: Case, batches: Iterator[Batch]) -> str | None:
    """What is wrong with an epoch of batches, or None. `kind`: Entry.rows of the loader."""
    corpus = np.concatenate([tokens.read(shard) for shard in range(tokens.shards)]).astype(np.int64)
    length = {"overlap": case.seq_len, "tile": case.seq_len + 1}.get(kind, case.seq_len)
    expected = sum((size - (length == case.seq_len)) // length for size in tokens.sizes)
    found = []
    for batch in islice(batches, expected // case.rows):  # the rest may be dropped or begin the next epoch
        inputs = batch.inputs.numpy().astype(np.int64)
        if batch.labels is None:
            inputs, labels = inputs[:, :-1], inputs[:, 1:]
        else:
            labels = batch.labels.numpy().astype(np.int64)
        if inputs.shape != (case.rows, case.seq_len) or labels.shape != inputs.shape:
            return f"inputs {inputs.shape} and labels {labels.shape}; expected {(case.rows, case.seq_len)}"
        rows = np.concatenate([inputs, labels[:, -1:]], axis=1)
        if not np.array_equal(rows[:, 1:], labels):
            return "the labels are not the inputs' next tokens"
        if case.documents and (wrong := _wrong_documents(batch, inputs, tokens.eod_id)):
            return wrong
        found.append(rows)
    rows = np.concatenate(found)
    first = DISTINCT_FROM[tokens.item]
    if kind == "documents":
        return _wrong_pieces(rows, corpus, tokens.eod_id, first)
    places = np.where(rows[:, 0] == tokens.eod_id, rows[:, 1] - 1, rows[:, 0]) - first
    if places.min() < 0 or places.max() + case.seq_len >= corpus.size:
        return "a row is not of the corpus"
    if not np.array_equal(rows, corpus[places[:, None] + np.arange(case.seq_len + 1)]):
        return "a row is not one run of the corpus"
    if kind == "random":
        return None
    apart = np.diff(np.sort(places))
    return None if apart.size == 0 or apart.min() >= length else "tokens come twice in an epoch"


def _wrong_documents(batch: Batch, inputs: NDArray[np.int64], eod_id: int) -> str | None:
    if batch.position_ids is None or batch.cu_seqlens is None:
        return "no position ids or no cu_seqlens"
    position_ids, starts = documents_of(inputs, eod_id)
    if not np.array_equal(batch.position_ids.numpy(), position_ids):
        return "the position ids do not begin anew after each end of a document"
    if not np.array_equal(batch.cu_seqlens.numpy(), starts):
        return "cu_seqlens are not where the documents begin"
    return None


def documents_of(inputs: NDArray[np.int64], eod_id: int) -> tuple[NDArray, NDArray]:
    """Position ids [B, T] and cu_seqlens, one token after another."""
    begins = np.ones(inputs.shape, bool)
    begins[:, 1:] = inputs[:, :-1] == eod_id
    columns = np.arange(inputs.shape[1])
    position_ids = columns - np.maximum.accumulate(np.where(begins, columns, 0), axis=1)
    return position_ids, np.append(np.flatnonzero(begins), inputs.size)


def _wrong_pieces(rows: NDArray[np.int64], corpus: NDArray[np.int64], eod_id: int, first: int) -> str | None:
    """Of rows whose documents are shuffled: each run of ids is of the corpus, each input comes once."""
    begins = {0, *(np.flatnonzero(corpus == eod_id) + 1).tolist()}
    for row in rows:
        after_end = np.flatnonzero(row[:-1] == eod_id) + 1
        for place, before in zip(row[after_end].tolist(), after_end.tolist(), strict=True):
            if place != eod_id and place - first not in begins:
                return f"after an end of a document, at {before}, no document begins"
        steps = np.diff(row)
        inside = (row[:-1] != eod_id) & (row[1:] != eod_id)
        if (steps[inside] != 1).any():
            return "a row holds something else than runs of documents"
        ends = row[:-1][(row[1:] == eod_id) & (row[:-1] != eod_id)] - first + 1
        if (corpus[ends] != eod_id).any():
            return "a document ends early"
    inputs = rows[:, :-1][rows[:, :-1] != eod_id]
    return None if np.unique(inputs).size == inputs.size else "tokens come twice in an epoch"
