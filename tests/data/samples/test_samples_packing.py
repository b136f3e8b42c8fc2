"""Packing plans are read alike in C++ and Python, and nothing is read that a file does not prove to hold."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_cases import corpus_of, documents_of, plan_window, targets

from llm.data import _native
from llm.data.prepare import plans
from llm.data.prepare.plans import write_plan
from llm.data.samples.packing import HEADER, MAGIC, VERSION, NumpyPackPlan, read_header
from llm.errors import InputError


@pytest.mark.parametrize("eod_first", [False, True])
def test_a_plan_reads_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eod_first: bool):
    monkeypatch.setattr(plans, "BLOCK", 1 << 10)
    monkeypatch.setattr(plans, "WINDOW", 500)
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
