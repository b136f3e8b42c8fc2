"""Many files as one sequence of tokens: reads across edges, least recently used files, checks, documents."""

from __future__ import annotations

import os
import resource
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from token_files import CORPORA, KINDS, NativeCorpus, corpus_of, failure, write_file

from llm.data import _native
from llm.data.tokens import megatron as formats
from llm.data.tokens import shards
from llm.data.tokens.shards import NumpyCorpus, ShardList, check_file, document_ends, document_lengths, inspect_files
from llm.errors import DamagedFile, InputError


def write_shards(folder: Path, format: str, dtype: str, sizes: list[int], vocab_size: int = 200) -> ShardList:
    rng = np.random.default_rng(sum(sizes))
    paths = [
        write_file(folder, f"{i:03}", format, dtype, [[*rng.integers(1, vocab_size, n - 1).tolist(), 0]])
        for i, n in enumerate(sizes)
    ]
    return corpus_of(format, dtype, paths, sizes, vocab_size)


def content(corpus: ShardList) -> NDArray:
    """All its ids, read without the code under test."""
    skip = 1024 if corpus.format == "llm.c" else 0
    return np.concatenate(
        [np.fromfile(path, f"<{np.dtype(corpus.dtype).str[1:]}", offset=skip) for path in corpus.paths]
    )


@pytest.mark.parametrize("kind", CORPORA)
@pytest.mark.parametrize(("format", "dtype"), KINDS)
def test_rows_cross_the_edges_of_files(tmp_path: Path, kind: str, format: str, dtype: str):
    corpus = write_shards(tmp_path, format, dtype, [7, 1, 1, 40, 3])
    expected, reader = content(corpus), CORPORA[kind](corpus)
    assert len(reader) == corpus.n_tokens == 52
    for start in range(52):
        for count in range(53 - start):
            assert np.array_equal(reader.read(start, count), expected[start : start + count])
    starts = np.array([0, 51, 5, 8, 9])
    assert np.array_equal(reader.read_rows(starts, 1), expected[starts][:, None])
    assert reader.read_rows(starts, 0).shape == (5, 0)
    assert reader.read_rows(np.array([], np.int64), 9).shape == (0, 9)


@pytest.mark.parametrize("kind", CORPORA)
def test_reads_outside_the_corpus_are_refused(tmp_path: Path, kind: str):
    reader = CORPORA[kind](write_shards(tmp_path, "raw", "uint16", [7, 5]))
    for start in (3, 12, 13, -1, 2**62, -(2**63), 2**63 - 1):
        with pytest.raises(IndexError, match=f"10 tokens from {start} lie outside the 12 tokens of the corpus"):
            reader.read(start, 10)
    assert reader.read(12, 0).size == 0
    for width in (-1, 13, 2**62):
        with pytest.raises((IndexError, ValueError)):
            reader.read_rows(np.array([0]), width)


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_both_corpora_read_the_same(tmp_path: Path, data: st.DataObject):
    format, dtype = data.draw(st.sampled_from(KINDS))
    sizes = data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=6))
    corpus = write_shards(tmp_path, format, dtype, sizes)
    native = NativeCorpus(corpus, _native.FileCache(data.draw(st.integers(1, 3))))
    expected = content(corpus)
    for _ in range(8):
        start = data.draw(st.integers(0, len(expected)))
        count = data.draw(st.integers(0, len(expected) - start))
        assert np.array_equal(native.read(start, count), expected[start : start + count])
        assert np.array_equal(NumpyCorpus(corpus).read(start, count), expected[start : start + count])


@pytest.mark.parametrize(("format", "dtype"), KINDS)
@pytest.mark.parametrize("at", [0, 1, 37, 999, 1000, 1999])
def test_an_id_outside_the_vocabulary_is_named_with_its_byte(tmp_path: Path, format: str, dtype: str, at: int):
    width = np.dtype(dtype).itemsize
    header = 1024 if format == "llm.c" else 0
    corpus = write_shards(tmp_path, format, dtype, [1000, 1000])
    path, byte = corpus.paths[at // 1000], header + at % 1000 * width
    for value, shown in [(200, 200), (255, 255), *([(-5, 2**32 - 5)] if width == 4 else [])]:
        with open(path, "r+b") as file:
            file.seek(byte)
            file.write(int(value % 2 ** (8 * width)).to_bytes(width, "little"))
        message = f"{path}: the id at byte {byte} is {shown}, expected ids below 200"
        for make in CORPORA.values():
            reader = make(corpus)
            assert failure(lambda reader=reader: reader.read(0, 2000)) == message
            assert failure(lambda reader=reader: reader.read(at, 1)) == message
            assert at == 0 or reader.read(0, at).size == at  # the others are read
            assert reader.read(at + 1, 1999 - at).size == 1999 - at


@pytest.mark.parametrize("kind", CORPORA)
def test_ids_that_always_fit_are_not_looked_at(tmp_path: Path, kind: str):
    for dtype, vocab_size in (("uint8", 256), ("uint16", 65536)):
        (tmp_path / "a.bin").write_bytes(b"\xff" * 64)
        tokens = 64 // np.dtype(dtype).itemsize
        corpus = corpus_of("raw", dtype, [str(tmp_path / "a.bin")], [tokens], vocab_size)
        assert CORPORA[kind](corpus).read(0, tokens).tolist() == [vocab_size - 1] * tokens
        one_less = corpus_of("raw", dtype, [str(tmp_path / "a.bin")], [tokens], vocab_size - 1)
        assert "at byte 0 is" in str(failure(lambda c=one_less, n=tokens: CORPORA[kind](c).read(0, n)))


@pytest.mark.parametrize("kind", CORPORA)
def test_a_file_cut_while_in_use_is_an_error_not_the_end_of_the_process(tmp_path: Path, kind: str):
    corpus = write_shards(tmp_path, "raw", "uint16", [5000, 5000])
    reader = CORPORA[kind](corpus)
    assert reader.read(0, 10_000).size == 10_000
    os.truncate(corpus.paths[1], 100)
    message = f"{corpus.paths[1]}: was cut to 100 bytes while in use, expected 10000"
    assert failure(lambda: reader.read(4990, 20)) == message
    assert reader.read(4000, 1000).size == 1000


def test_files_are_opened_when_first_read_and_closed_least_recently_used_first(tmp_path: Path):
    def open_files() -> set[str]:
        links = (os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd"))
        paths = {os.readlink(link) for link in links if os.path.lexists(link)}
        return {os.path.basename(path) for path in paths & set(corpus.paths)}

    corpus = write_shards(tmp_path, "megatron", "uint16", [10] * 6)
    cache = _native.FileCache(2)
    reader = NativeCorpus(corpus, cache)
    assert (cache.opened, cache.held) == (0, 0)
    reader.read(5, 1)
    assert (cache.opened, cache.held, open_files()) == (1, 1, {"000.bin"})
    reader.read(15, 1)
    reader.read(5, 1)
    assert (cache.opened, cache.held) == (2, 2)
    reader.read(25, 1)  # 001 is the one that was not used since
    assert (cache.opened, cache.held, open_files()) == (3, 2, {"000.bin", "002.bin"})
    reader.read(0, 60)
    assert (cache.held, open_files()) == (2, {"004.bin", "005.bin"})
    other = NativeCorpus(corpus, cache)  # another corpus of the same files, in the same cache
    other.read(55, 1)
    assert (cache.held, open_files()) == (2, {"005.bin"})
    del reader, other, cache
    assert open_files() == set()


def test_thousands_of_files_are_read_under_a_low_limit(tmp_path: Path):
    corpus = write_shards(tmp_path, "raw", "uint16", [3] * 2000)
    expected = content(corpus)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (2 * in_use + 200, hard))
    try:
        native = NativeCorpus(corpus, _native.FileCache())
        for reader in (native, NumpyCorpus(corpus)):
            assert np.array_equal(reader.read(0, 6000), expected)
        assert native.cache.held == in_use + 100
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_corpus_may_have_more_than_2_to_32_tokens(tmp_path: Path):
    """Sparse files: positions, byte offsets and counts beyond 32 bits."""
    sizes = [2**32 + 10, 2**33, 6]
    paths = []
    for i, n in enumerate(sizes):
        paths.append(str(tmp_path / f"{i}.bin"))
        with open(paths[-1], "wb") as file:
            file.truncate(2 * n)
            file.seek(2 * n - 4)
            file.write(np.array([i + 1, i + 2], "<u2").tobytes())
    corpus = corpus_of("raw", "uint16", paths, sizes, 5)
    for make in CORPORA.values():
        reader = make(corpus)
        assert len(reader) == 2**32 + 2**33 + 16
        assert reader.read(2**32 + 6, 6).tolist() == [0, 0, 1, 2, 0, 0]
        assert reader.read(2**32 + 2**33 + 8, 8).tolist() == [2, 3, 0, 0, 0, 0, 3, 4]
    with open(paths[1], "r+b") as file:
        file.seek(2 * (2**32 + 5))
        file.write(b"\xff\0")
    for make in CORPORA.values():
        assert make(corpus).read(2**33, 15).tolist() == [0] * 15
        found = failure(lambda make=make: make(corpus).read(2**33 + 10, 100))
        assert found == f"{paths[1]}: the id at byte {2 * (2**32 + 5)} is 255, expected ids below 5"


def test_threads_share_a_cache(tmp_path: Path):
    corpus = write_shards(tmp_path, "raw", "int32", [50] * 20)
    expected, reader = content(corpus), NativeCorpus(corpus, _native.FileCache(2))
    wrong = []

    def work(seed: int) -> None:
        starts = np.random.default_rng(seed).integers(0, 900, 500)
        rows = reader.read_rows(starts, 100)
        if not np.array_equal(rows, expected[starts[:, None] + np.arange(100)]):
            wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def split_documents(tokens: list[int], eod: int, eod_first: bool) -> list[int]:
    """The lengths of documents, one token after another."""
    lengths, current = [], 0
    for token in tokens:
        if eod_first and token == eod and current:
            lengths.append(current)
            current = 0
        current += 1
        if not eod_first and token == eod:
            lengths.append(current)
            current = 0
    return lengths + [current] * (current > 0)


@pytest.mark.parametrize("eod_first", [False, True])
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_documents_are_found_by_their_token_across_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eod_first: bool, data: st.DataObject
):
    monkeypatch.setattr(shards, "SCANNED", data.draw(st.integers(1, 9)))
    files = data.draw(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=1, max_size=4))
    paths = [write_file(tmp_path, f"{i}", "raw", "uint16", [file]) for i, file in enumerate(files)]
    corpus = corpus_of("raw", "uint16", paths, [len(f) for f in files], 4, eod_id=2, eod_first=eod_first)
    found = [int(n) for block in document_lengths(corpus) for n in block]
    assert found == split_documents([token for file in files for token in file], 2, eod_first)


@pytest.mark.parametrize("format", ["megatron", "datatrove"])
def test_documents_are_found_by_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str):
    monkeypatch.setattr(formats, "CHUNK", 3)
    lengths = [[4, 1, 1, 9, 2, 2, 7], [3], [1, 5, 1]]
    paths = [write_file(tmp_path, f"{i}", format, "uint16", [[7] * n for n in file]) for i, file in enumerate(lengths)]
    corpus = corpus_of(format, "uint16", paths, [sum(file) for file in lengths], 9)
    assert [int(n) for block in document_lengths(corpus) for n in block] == [n for file in lengths for n in file]
    Path(paths[2]).write_bytes(b"")
    with pytest.raises(DamagedFile, match="has 0 bytes"):
        list(document_lengths(corpus))


def test_a_document_of_megatron_may_have_several_sequences_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_file(tmp_path, "a", "megatron", "uint16", [[1] * 3, [2], [3] * 5, [4] * 2])
    index = tmp_path / "a.idx"
    bounds = [0, 0, 2, 2, 3, 4, 4]
    raw = index.read_bytes()
    index.write_bytes(raw[:26] + struct.pack("<Q", len(bounds)) + raw[34 : 34 + 48] + struct.pack("<7q", *bounds))
    for chunk in (1, 2, 100):
        monkeypatch.setattr(formats, "CHUNK", chunk)
        found = document_lengths(corpus_of("megatron", "uint16", [path], [11], 9))
        assert [int(n) for block in found for n in block] == [0, 4, 0, 5, 2, 0]


@pytest.mark.parametrize("lengths", [[0, 3, 0, 0, 2, 1, 0], [4, 0, 2], [0, 0, 6], [6, 0], [0, 6]])
def test_sequences_of_no_tokens_are_documents_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lengths: list[int]):
    path = write_file(tmp_path, "a", "megatron", "uint16", [[7] * (n - 1) + [0] if n else [] for n in lengths])
    corpus = inspect_files("x", path, vocab_size=9, eod_id=0)
    check_file(path, "megatron", "uint16", 6)
    for kind in CORPORA.values():
        assert kind(corpus).read(0, 6).tolist() == content(corpus).tolist()
    for chunk in (1, 2, 100):
        monkeypatch.setattr(formats, "CHUNK", chunk)
        assert [int(n) for block in document_lengths(corpus) for n in block] == lengths
    assert next(n for _, n in document_ends(corpus, 100)).tolist() == sorted({*np.cumsum(lengths).tolist()} - {0})


@pytest.mark.parametrize(("format", "dtype"), KINDS)
def test_files_folders_and_globs_are_inspected(tmp_path: Path, format: str, dtype: str):
    for name, documents in (("b", [[1, 0], [2, 3, 0]]), ("a", [[4, 0]])):
        write_file(tmp_path, name, format, dtype, documents)
    suffix = ".ds" if format == "datatrove" else ".bin"
    for pattern in (
        str(tmp_path),
        f"{tmp_path}/",
        f"{tmp_path}/*",
        f"{tmp_path}/*{suffix}",
        f"{tmp_path}/[ab]{suffix}",
    ):
        corpus = inspect_files("x", pattern, vocab_size=9, eod_id=0, raw_dtype=dtype)
        assert [os.path.basename(path) for path in corpus.paths] == [f"a{suffix}", f"b{suffix}"]
        assert (corpus.format, corpus.dtype, corpus.tokens, corpus.n_tokens) == (format, dtype, (2, 5), 7)
        assert (corpus.name, corpus.vocab_size, corpus.eod_id, corpus.plans) == ("x", 9, 0, {})
        assert corpus.eod_first == (format == "llm.c")
    one = inspect_files("x", f"{tmp_path}/b{suffix}", vocab_size=9, eod_id=0, raw_dtype=dtype)
    assert one.tokens == (5,)


def test_raw_files_have_the_narrowest_dtype_unless_it_is_given(tmp_path: Path):
    (tmp_path / "a.bin").write_bytes(bytes(16))
    found = [inspect_files("x", str(tmp_path), vocab_size=n, eod_id=0).dtype for n in (256, 65536, 65537)]
    assert found == ["uint16", "uint16", "int32"]
    assert inspect_files("x", str(tmp_path), vocab_size=99, eod_id=0, raw_dtype="uint8").tokens == (16,)


def test_what_is_no_corpus_is_refused_by_name(tmp_path: Path):
    def inspect(pattern: str, vocab_size: int = 9, eod_id: int = 0) -> None:
        inspect_files("fine web", str(tmp_path / pattern), vocab_size=vocab_size, eod_id=eod_id)

    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    write_file(tmp_path / "mixed", "a", "raw", "uint16", [[1, 0]])
    write_file(tmp_path / "mixed", "b", "llm.c", "uint16", [[1, 0]])
    write_file(tmp_path, "wide", "megatron", "uint16", [[1, 0]])
    (tmp_path / "notes.txt").write_text("ab")
    for pattern, message in [
        ("empty", "no token file"),
        ("none.bin", "no token file"),
        ("*.npy", "no token file"),
        ("notes.*", "does not end in .bin or .ds"),
        ("notes.txt", "does not end in .bin or .ds"),
        ("mixed", r"a\.bin is raw with uint16 ids, .*b\.bin is llm\.c with uint16 ids; expected files of one format"),
    ]:
        with pytest.raises(InputError, match=message) as raised:
            inspect(pattern)
        assert "fine web" in str(raised.value)
    for vocab_size, eod_id in ((65537, 0), (9, 9), (9, -1)):  # ids that were cut to 16 bits, say
        with pytest.raises(InputError, match=f"a vocabulary|vocabulary has {vocab_size} ids and .* {eod_id}"):
            inspect("wide.bin", vocab_size, eod_id)
    os.symlink("nowhere", tmp_path / "lost.bin")
    with pytest.raises(DamagedFile, match=r"lost\.bin: cannot be opened"):
        inspect("lost.bin")
