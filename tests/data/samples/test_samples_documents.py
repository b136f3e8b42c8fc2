"""Document masks: position ids and cu_seqlens by hand, from an oracle that walks the tokens, and in C++."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from llm.data import _native
from llm.data.samples.documents import lay_out_pieces, scan_documents

DTYPES = ["uint8", "uint16", "int32", "uint32"]
EOD = 7


def rows_of(tokens: list[list[int]], dtype: str = "uint16") -> NDArray:
    return np.array(tokens, dtype)


def test_the_end_of_document_token_ends_its_document():
    tokens = rows_of([[1, 2, 7, 3, 7, 4], [7, 7, 1, 2, 3, 7]])
    positions, cu_seqlens = scan_documents(tokens, EOD, eod_first=False)
    assert positions.tolist() == [[0, 1, 2, 0, 1], [0, 0, 0, 1, 2]]
    assert cu_seqlens.tolist() == [0, 3, 5, 6, 7, 10]


def test_or_begins_it():
    tokens = rows_of([[1, 2, 7, 3, 7, 4], [7, 7, 1, 2, 3, 7]])
    positions, cu_seqlens = scan_documents(tokens, EOD, eod_first=True)
    assert positions.tolist() == [[0, 1, 0, 1, 0], [0, 0, 1, 2, 3]]
    assert cu_seqlens.tolist() == [0, 2, 4, 5, 6, 10]


def walked(tokens: NDArray, eod_first: bool) -> tuple[list[list[int]], list[int]]:
    """The oracle: one token after another."""
    positions, starts = [], []
    for row, sample in enumerate(tokens[:, :-1].tolist()):
        positions.append([])
        for t, token in enumerate(sample):
            begins = t == 0 or (token if eod_first else sample[t - 1]) == EOD
            positions[-1].append(0 if begins else positions[-1][-1] + 1)
            if begins:
                starts.append(row * len(sample) + t)
    return positions, [*starts, tokens.shape[0] * (tokens.shape[1] - 1)]


@settings(max_examples=200, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), eod_first=st.booleans(), share=st.sampled_from([0, 0.02, 0.5, 1]))
def test_both_forms_walk_the_tokens(data: st.DataObject, dtype: str, eod_first: bool, share: float):
    # Lengths around 64, the tokens that the C++ form compares at once.
    shape = data.draw(st.integers(1, 3)), 1 + data.draw(st.sampled_from([1, 2, 5, 63, 64, 65, 66, 128, 129, 200]))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    tokens = np.where(rng.random(shape) < share, EOD, rng.integers(0, 2, shape) * 255).astype(dtype)
    positions, cu_seqlens = walked(tokens, eod_first)
    for form in (scan_documents, _native.scan_documents):
        found = form(tokens, EOD, eod_first)
        assert found[0].dtype == found[1].dtype == np.int32
        assert found[0].tolist() == positions
        assert found[1].tolist() == cu_seqlens


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_the_whole_id_counts(dtype: str):
    """An id that shares its low bytes with the end of document, or does not fit the files' type, ends nothing."""
    for eod in (7 + 2**8, 7 + 2**16, 2**31 + 7):
        if eod <= np.iinfo(dtype).max:
            continue
        tokens = np.full((1, 70), 7, dtype)
        assert _native.scan_documents(tokens, eod, False)[1].tolist() == [0, 69]
    if np.dtype(dtype).itemsize == 4:
        tokens = np.full((1, 70), 2**30 + 7, dtype)
        assert _native.scan_documents(tokens, 7, False)[1].tolist() == [0, 69]


def test_what_holds_no_samples_is_refused():
    for tokens in (np.zeros((2, 1), "uint16"), np.zeros(5, "uint16"), np.zeros((2, 5), "float32")):
        with pytest.raises(ValueError, match="token ids"):
            _native.scan_documents(tokens, EOD, False)


def pieces_of(*tokens: int) -> NDArray[np.int64]:
    return np.array([(1000 * i, n) for i, n in enumerate(tokens)], np.int64)


def test_pieces_and_padding_are_laid_out_one_after_another():
    rows = [pieces_of(3, 1, 2), pieces_of(7), pieces_of(6), pieces_of(6, 1), pieces_of(1)]
    positions, cu_seqlens, counted = lay_out_pieces(rows, 6)
    assert positions.tolist() == [
        [0, 1, 2, 0, 0, 1],  # and padding in the last slot, which is no input
        [0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 4, 5],
        [0, 0, 1, 2, 3, 4],
    ]
    assert cu_seqlens.tolist() == [0, 3, 4, 6, 12, 18, 24, 25, 30]
    assert counted.tolist() == [
        [1, 1, 0, 0, 1, 0],
        [1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0],
    ]


@settings(max_examples=200, deadline=None)
@given(seq_len=st.integers(1, 150), lengths=st.lists(st.integers(1, 60), min_size=1))
def test_both_forms_lay_out_slot_by_slot(seq_len: int, lengths: list[int]):
    ends = np.cumsum(lengths)
    lengths = [int(n) for n, end in zip(lengths, ends, strict=True) if end <= seq_len + 1] or [1]
    place = [(piece, i) for piece, n in enumerate(lengths) for i in range(n)]
    place += [(-1, i) for i in range(seq_len + 1 - len(place))]  # padding
    positions, cu_seqlens, counted = lay_out_pieces([pieces_of(*lengths)], seq_len)
    assert positions[0].tolist() == [i for _, i in place[:-1]]
    assert cu_seqlens.tolist() == [*(t for t in range(seq_len) if place[t][1] == 0), seq_len]
    assert counted[0].tolist() == [int(piece >= 0 and i > 0) for piece, i in place[1:]]
    found = _native.lay_out_pieces(pieces_of(*lengths), seq_len)
    for mine, twin in zip(found, (positions[0], cu_seqlens, counted[0]), strict=True):
        assert mine.dtype == twin.dtype
        assert np.array_equal(mine, twin)


@pytest.mark.parametrize("tokens", [(6,), (5, 1), (3, 0), (-1,), (2**62, 2**62)])
def test_pieces_that_do_not_fit_are_refused(tokens: tuple[int, ...]):
    with pytest.raises(ValueError, match="does not fit"):
        _native.lay_out_pieces(pieces_of(*tokens), 4)


def test_a_row_without_pieces_is_refused():
    with pytest.raises(ValueError, match="without a piece"):
        _native.lay_out_pieces(np.empty((0, 2), np.int64), 4)
