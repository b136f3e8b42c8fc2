"""Packing plans: every target in exactly one row, the same plan in C++ and Python, nothing read that a file does not
prove to hold."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from llm.data import _native
from llm.data.samples import packing
from llm.data.samples.packing import (
    HEADER,
    MAGIC,
    VERSION,
    NumpyPackPlan,
    document_ranges,
    plan_window,
    read_header,
    windows,
    write_plan,
)
from llm.data.tokens.headers import DamagedFile
from llm.data.tokens.shards import ShardList
from llm.errors import InputError

EOD = 7
LENGTHS = st.lists(st.one_of(st.integers(1, 12), st.integers(1, 100)), min_size=1, max_size=60)


def corpus_of(folder: Path, lengths: list[int], eod_first: bool = False, files: int = 2) -> ShardList:
    """Documents of these lengths, without regard to the edges of the files that they lie in."""
    tokens = np.full(sum(lengths), 1, "uint16")
    ends = np.cumsum(lengths)
    tokens[ends - lengths if eod_first else ends - 1] = EOD
    return shards_of(folder, tokens, eod_first, files)


def shards_of(folder: Path, tokens: NDArray, eod_first: bool, files: int) -> ShardList:
    parts = [part for part in np.array_split(tokens, files) if part.size]
    paths = [folder / f"{i}.bin" for i in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        part.tofile(path)
    sizes = tuple(part.size for part in parts)
    return ShardList("test", "raw", "uint16", tuple(map(str, paths)), sizes, 100, EOD, eod_first)


def documents_of(lengths: list[int], first: int = 0) -> NDArray[np.int64]:
    return np.stack([first + np.cumsum(lengths) - lengths, lengths], axis=1).astype(np.int64)


def targets(pieces: NDArray[np.int64]) -> Counter[int]:
    """How often each token is a target: all of a piece but its first."""
    return Counter(token for start, n in pieces.tolist() for token in range(start + 1, start + n))


def tokens_of(pieces: NDArray[np.int64]) -> set[int]:
    return {token for start, n in pieces.tolist() for token in range(start, start + n)}


def test_documents_are_packed_by_hand():
    pieces, row_ends = _native.plan_window(documents_of([3, 5, 12, 1, 2, 4]), 4)
    # Pieces of 5: the document of 5; of 12: tokens 8..12, 12..16, and 16..19. Then 4, 4, 3, 2, 1.
    rows = [row.tolist() for row in np.split(pieces, row_ends[:-1])]
    assert rows == [
        [[3, 5]],
        [[8, 5]],
        [[12, 5]],
        [[16, 4]],
        [[23, 4], [20, 1]],  # of the rows with one free slot, the one changed last
        [[0, 3], [21, 2]],
    ]


@settings(max_examples=200, deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(1, 40), first=st.sampled_from([0, 2**40]))
def test_every_target_lies_in_exactly_one_row(lengths: list[int], seq_len: int, first: int):
    documents = documents_of(lengths, first)
    pieces, row_ends = _native.plan_window(documents, seq_len)
    assert targets(pieces) == targets(documents)
    assert tokens_of(pieces) == tokens_of(documents)
    starts = [start for start, n in documents.tolist() if n == 1]
    assert Counter(pieces[pieces[:, 1] == 1, 0].tolist()) == Counter(starts)
    assert row_ends[-1] == len(pieces)
    assert all(1 <= row[:, 1].sum() <= seq_len + 1 for row in np.split(pieces, row_ends[:-1]))


@settings(max_examples=200, deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(1, 200))
def test_both_forms_plan_alike(lengths: list[int], seq_len: int):
    for found, twin in zip(
        *(f(documents_of(lengths), seq_len) for f in (_native.plan_window, plan_window)), strict=True
    ):
        assert found.dtype == twin.dtype == np.int64
        assert np.array_equal(found, twin)


def test_both_forms_plan_alike_where_free_spaces_need_several_levels_of_bits():
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 300_000, 3000).tolist()
    for found, twin in zip(
        *(f(documents_of(lengths), 300_000) for f in (_native.plan_window, plan_window)), strict=True
    ):
        assert np.array_equal(found, twin)


@pytest.mark.parametrize(
    ("documents", "seq_len", "message"),
    [
        ([[0, 0]], 4, "a document of 0 tokens"),
        ([[0, -3]], 4, "a document of -3 tokens"),
        ([[-1, 3]], 4, "from -1 on"),
        ([[2**63 - 2, 3]], 4, "a document of 3 tokens"),
        ([[0, 3]], 0, "seq_len is 0"),
        ([[0, 3]], 2**31 - 1, "seq_len is 2147483647"),
        ([0, 3], 4, r"pieces \[n, 2\]"),
    ],
)
def test_impossible_documents_are_refused(documents: list, seq_len: int, message: str):
    with pytest.raises(ValueError, match=message):
        _native.plan_window(np.array(documents, np.int64), seq_len)


@settings(max_examples=150, deadline=None)
@given(
    lengths=LENGTHS,
    seq_len=st.integers(1, 30),
    block=st.integers(1, 50),
    eod_first=st.booleans(),
    open_end=st.booleans(),
    files=st.integers(1, 3),
)
def test_blocks_and_the_edges_of_files_do_not_change_the_pieces(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    seq_len: int,
    block: int,
    eod_first: bool,
    open_end: bool,
    files: int,
):
    folder = tmp_path_factory.getbasetemp()
    shards = corpus_of(folder, lengths, eod_first, files)
    if open_end:  # the last document does not end, the first does not begin
        tokens = np.concatenate([np.fromfile(path, "uint16") for path in shards.paths])
        tokens[0 if eod_first else -1] = 1
        shards = shards_of(folder, tokens, eod_first, files)
    ranges = np.concatenate(list(document_ranges(shards, seq_len, block)))
    found, expected = (plan_window(documents, seq_len)[0] for documents in (ranges, documents_of(lengths)))
    assert sorted(found.tolist()) == sorted(expected.tolist())
    assert max(ranges[:, 1]) <= block + 2 * seq_len + 1, "what is known of a document is handed over"


def test_windows_are_bounded_in_pieces():
    ranges = [documents_of([1] * 5), documents_of([100]), documents_of([1] * 3), documents_of([2])]
    found = list(windows(iter(ranges), 10, window=9))
    assert [len(window) for window in found] == [6, 4]
    assert np.array_equal(np.concatenate(found), np.concatenate(ranges))


@pytest.mark.parametrize("eod_first", [False, True])
def test_a_plan_reads_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eod_first: bool):
    monkeypatch.setattr(packing, "BLOCK", 1 << 10)
    monkeypatch.setattr(packing, "WINDOW", 500)
    rng = np.random.default_rng(2)
    lengths = (1 + rng.lognormal(3, 1, 3000)).astype(int).tolist()
    shards, path, seen = corpus_of(tmp_path, lengths, eod_first), tmp_path / "plan", []
    header = write_plan(shards, 64, path, lambda *progress: seen.append(progress))
    total = shards.n_tokens
    assert header == read_header(path)
    assert sorted(name.name for name in tmp_path.iterdir()) == ["0.bin", "1.bin", "plan"]
    assert seen[-1] == ("packing samples of 64 tokens", total, total)
    native, twin = _native.PackPlan(str(path), 64, total), NumpyPackPlan(path, 64, total)
    assert len(native) == len(twin) == header.rows
    rows = [native.pieces(row) for row in range(len(native))]
    assert all(np.array_equal(row, twin.pieces(i)) for i, row in enumerate(rows))
    pieces = np.concatenate(rows)
    assert targets(pieces) == targets(documents_of(lengths))
    assert len(pieces) == header.pieces and pieces[:, 1].sum() == header.piece_tokens
    for i, row in enumerate(rows):
        assert native.targets(i) == twin.targets(i) == row[:, 1].sum() - len(row)
    again = tmp_path / "again"
    write_plan(shards, 64, again)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("seq_len", [256, 1024])
def test_documents_of_usual_lengths_leave_hardly_any_padding(tmp_path: Path, seq_len: int):
    lengths = (1 + np.random.default_rng(3).lognormal(6, 1.2, 20_000)).astype(int).tolist()
    header = write_plan(corpus_of(tmp_path, lengths), seq_len, tmp_path / "plan")
    assert 0 <= header.padding_share < 0.01
    assert header.padding_share == 1 - header.piece_tokens / (header.rows * (seq_len + 1))


def test_a_plan_appears_only_when_whole(tmp_path: Path):
    path = tmp_path / "plan"
    path.write_bytes(b"older")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_plan(corpus_of(tmp_path, [5, 6]), 4, path, interrupt)
    assert path.read_bytes() == b"older"
    assert sorted(name.name for name in tmp_path.iterdir()) == ["0.bin", "1.bin", "plan"]


def test_a_damaged_token_file_ends_the_planning(tmp_path: Path):
    shards = corpus_of(tmp_path, [5, 6])
    Path(shards.paths[1]).write_bytes(b"")
    with pytest.raises(DamagedFile, match=r"1\.bin"):
        write_plan(shards, 4, tmp_path / "plan")
    assert not (tmp_path / "plan").exists()


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """For samples of 4 tokens of a corpus of 27: 6 rows of 8 pieces."""
    write_plan(corpus_of(tmp_path, [3, 5, 12, 1, 2, 4]), 4, tmp_path / "plan")
    return tmp_path / "plan"


def both_refuse(path: Path, message: str, seq_len: int = 4, corpus_tokens: int = 27) -> None:
    with pytest.raises(RuntimeError, match=message) as native:
        _native.PackPlan(str(path), seq_len, corpus_tokens)
    with pytest.raises(InputError, match=message) as twin:
        NumpyPackPlan(path, seq_len, corpus_tokens)
    assert str(path) in str(native.value) and str(path) in str(twin.value)


def test_a_plan_for_something_else_is_refused(plan: Path):
    both_refuse(plan, "seq_len 4.*expected 5.*prepare the data again", seq_len=5)
    both_refuse(plan, "tokens 27; expected .*28; prepare the data again", corpus_tokens=28)
    both_refuse(plan.with_name("none"), "cannot be")
    for bad in ((0, 27), (2**63 - 1, 27), (4, 0), (4, -1)):
        with pytest.raises(ValueError, match="needs seq_len"):
            _native.PackPlan(str(plan), *bad)


def test_a_plan_cut_anywhere_or_too_long_is_refused(plan: Path):
    whole = plan.read_bytes()
    for size in range(len(whole)):
        plan.write_bytes(whole[:size])
        both_refuse(plan, "truncated")
    plan.write_bytes(whole + b"\0")
    both_refuse(plan, "truncated or damaged")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (0, 0, "packing plan"),
        (1, 2, "version"),
        (2, 2**64 - 1, "expected 4"),
        (3, 2**64 - 1, "expected 27|cannot be a corpus"),
        (4, 0, "damaged"),
        (4, 7, "damaged"),
        (4, 2**63, "damaged"),
        (5, 2**60 + 8, "damaged"),  # times 16 bytes is right, modulo 2^64
        (5, 2**64 - 1, "damaged"),
        (6, 26, "26 tokens in 6 rows, which cannot be a corpus of 27"),
        (6, 31, "31 tokens in 6 rows, which cannot be a corpus of 27"),
    ],
)
def test_a_lying_header_is_refused(plan: Path, field: int, value: int, message: str):
    raw = bytearray(plan.read_bytes())
    struct.pack_into("<Q", raw, 8 * field, value)
    plan.write_bytes(raw)
    both_refuse(plan, message)


def test_more_rows_than_pieces_are_refused(plan: Path):
    raw = bytearray(plan.read_bytes())
    struct.pack_into("<QQ", raw, 32, 20, 1)  # 20 rows of 1 piece take as many bytes as 6 rows of 8
    plan.write_bytes(raw)
    both_refuse(plan, "20 rows of 1 pieces")


def test_a_row_does_not_go_on_behind_the_last_piece(tmp_path: Path):
    path = tmp_path / "plan"
    write_plan(corpus_of(tmp_path, [5, 2]), 4, path)
    raw = bytearray(path.read_bytes())
    struct.pack_into("<q", raw, len(raw) - 8, 3)  # the rows' ends, 1 and 3, would do as a third piece
    path.write_bytes(raw)
    for form, error in ((_native.PackPlan(str(path), 4, 7), RuntimeError), (NumpyPackPlan(path, 4, 7), InputError)):
        with pytest.raises(error, match="row 1 has pieces 1 to 3 of 2"):
            form.pieces(1)


def damaged(plan: Path, offset: int, value: int) -> tuple[_native.PackPlan, NumpyPackPlan]:
    raw = bytearray(plan.read_bytes())
    struct.pack_into("<q", raw, offset, value)
    plan.write_bytes(raw)
    return _native.PackPlan(str(plan), 4, 27), NumpyPackPlan(plan, 4, 27)


PIECE, ROW_END = HEADER.size, HEADER.size + 16 * 8


@pytest.mark.parametrize(
    ("row", "offset", "value"),
    [
        (0, PIECE, -1),
        (0, PIECE, 23),  # 23 + 5 > 27
        (0, PIECE, 2**63 - 1),
        (0, PIECE + 8, 0),
        (0, PIECE + 8, -(2**63)),
        (0, PIECE + 8, 6),
        (0, PIECE + 8, 2**63 - 1),
        (4, PIECE + 8 * 11, 2),  # the second piece of a row no longer fits beside the first
        (0, ROW_END, 0),
        (0, ROW_END, -1),
        (1, ROW_END, 2),  # ends where its successor does: that one is empty
        (0, ROW_END, 9),
        (1, ROW_END, -5),
        (5, ROW_END + 8 * 5, 9),
    ],
)
def test_a_lying_row_is_refused_when_it_is_asked_for(plan: Path, row: int, offset: int, value: int):
    for form, error in zip(damaged(plan, offset, value), (RuntimeError, InputError), strict=True):
        for call in (form.pieces, form.targets):
            with pytest.raises(error, match=f"is damaged.*row {row} has") as raised:
                call(row)
            assert str(plan) in str(raised.value)


@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_damage_is_never_read_past_the_corpus(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    """Any bytes over any others: both forms refuse the same plans and rows, and what they give lies in the corpus."""
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    packed, row_ends = plan_window(documents_of([3, 5, 12, 1, 2, 4]), 4)
    raw = bytearray(HEADER.pack(MAGIC, VERSION, 4, 27, len(row_ends), len(packed), 29))
    raw += packed.tobytes() + row_ends.tobytes()
    for _ in range(data.draw(st.integers(1, 3))):
        offset = data.draw(st.integers(0, len(raw) // 8 - 1)) * 8 + data.draw(st.sampled_from([0, 0, 1, 7]))
        written = data.draw(st.one_of(st.binary(max_size=8), st.integers(-3, 30).map(lambda n: struct.pack("<q", n))))
        raw[offset : offset + len(written)] = written[: len(raw) - offset]
    path.write_bytes(raw)
    found = [attempt(_native.PackPlan, str(path), 4, 27), attempt(NumpyPackPlan, path, 4, 27)]
    assert (found[0] is None) == (found[1] is None)
    if found[0] is None or found[1] is None:
        return
    assert len(found[0]) == len(found[1])
    for row in range(len(found[0])):
        native, twin = (attempt(form.pieces, row) for form in found)
        assert (native is None) == (twin is None)
        if native is not None and twin is not None:
            assert np.array_equal(native, twin)
            assert (native >= [0, 1]).all() and (native.sum(axis=1) <= 27).all() and 1 <= native[:, 1].sum() <= 5


def attempt(call: Callable, *arguments: object):
    """What the call gives, or None where it refuses."""
    try:
        return call(*arguments)
    except (RuntimeError, InputError):
        return None


def test_a_row_outside_the_plan_is_refused(plan: Path):
    for form in (_native.PackPlan(str(plan), 4, 27), NumpyPackPlan(plan, 4, 27)):
        for row in (-1, 6, 2**62):
            with pytest.raises(IndexError, match="outside its 6 rows"):
                form.pieces(row)


def test_a_plan_cut_while_in_use_is_noticed(plan: Path):
    native = _native.PackPlan(str(plan), 4, 27)
    native.check_not_truncated()
    with plan.open("r+b") as file:
        file.truncate(100)
    with pytest.raises(RuntimeError, match="was cut to 100 bytes"):
        native.check_not_truncated()
