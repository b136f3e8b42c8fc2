"""Packing plans: every target in exactly one row, the same in C++ and Python, written once and listed in manifests."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from plan_cases import corpus_of, documents_of, plan_window, shards_of, targets

from llm.config import DataConfig, ModelConfig, PhaseChange, RunConfig
from llm.data import _native
from llm.data.corpora import Corpora
from llm.data.prepare import plans
from llm.data.prepare.plans import document_ranges, windows, write_missing, write_plan, write_plans
from llm.data.samples.packing import NumpyPackPlan
from llm.data.tokens.hashes import check_hashes
from llm.data.tokens.manifest import read_manifest
from llm.errors import DamagedFile, InputError

LENGTHS = st.lists(st.one_of(st.integers(1, 12), st.integers(1, 100)), min_size=1, max_size=60)


def make_config(**data) -> RunConfig:
    fields = {"path": "one", "seq_len": 16, "packing": "best_fit", "document_masks": True} | data
    return RunConfig(model=ModelConfig(vocab_size=50), data=DataConfig(**fields))


@pytest.mark.usefixtures("two_folders")
def test_none_are_needed_for_chunks():
    config = make_config(packing="chunk", blend={"one": 1.0, "not prepared yet": 1.0})
    assert write_plans(config) == []
    assert not list(Path("one").glob("*.plan"))


@pytest.mark.usefixtures("two_folders")
def test_each_corpus_gets_those_of_the_lengths_it_is_drawn_in():
    phases = (
        PhaseChange(samples=32, seq_len=24),
        PhaseChange(samples=64, seq_len=32, blend={"two": 1.0, "one": 1.0}),
    )
    config = make_config(phases=phases)
    written = write_plans(config)
    names = ["one/train.16.plan", "one/train.24.plan", "one/train.32.plan", "two/train.32.plan"]
    assert sorted(map(str, written)) == sorted(names)
    assert sorted(map(str, Path().glob("*/*.plan"))) == sorted(names)
    corpora = Corpora.open(config)
    for folder in ("one", "two"):
        check_hashes(Path(folder), read_manifest(Path(folder)))
    shards = corpora.training["two"].shards
    plan = NumpyPackPlan(Path(shards.plan(32)), 32, shards.n_tokens)
    assert sum(plan.targets(row) for row in range(len(plan))) > 2900
    assert write_plans(config) == []


@pytest.mark.usefixtures("two_folders")
def test_files_without_a_manifest_are_refused():
    np.arange(50, dtype="<u2").tofile("a.bin")
    config = make_config(blend={"a.bin": 1.0})
    with pytest.raises(InputError, match=r"a\.bin has no manifest that could list its packing plans; register"):
        write_plans(config)


@pytest.mark.usefixtures("two_folders")
def test_processes_that_write_plans_at_once_lose_none(monkeypatch: pytest.MonkeyPatch):
    """Both read the manifest before either has written."""
    corpora = [Corpora.open(make_config()), Corpora.open(make_config(seq_len=24))]
    written, write = [], plans.write_plan
    monkeypatch.setattr(plans, "write_plan", lambda *args: (written.append(args[1]), write(*args)))
    threads = [
        threading.Thread(target=write_missing, args=(opened, lambda *_: None)) for opened in [*corpora, corpora[0]]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    listed = read_manifest(Path("one")).files
    assert {name for name in listed if name.endswith(".plan")} == {"train.16.plan", "train.24.plan"}
    assert sorted(written) == [16, 24]
    check_hashes(Path("one"), read_manifest(Path("one")))


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
