"""Headers and indexes of four formats: sound ones are read, others refused, by C++ and Python in the same words."""

from __future__ import annotations

import os
import resource
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from token_files import CORPORA, KINDS, LLMC, NativeCorpus, corpus_of, failure, megatron_index, write_file

from llm.data import _native
from llm.data.tokens.headers import read_header
from llm.data.tokens.shards import check_file, inspect_files
from llm.errors import DamagedFile, InputError

DOCUMENTS = [[5, 6, 0], [0], [7, 250, 9, 0]]
TOKENS = 8


def open_errors(path: str, format: str, dtype: str, tokens: int) -> set[str | None]:
    """What each reader says when it first reads the file."""
    shards = corpus_of(format, dtype, [path], [tokens], 251)
    return {failure(lambda make=make: make(shards).read(0, 1)) for make in CORPORA.values()}


@pytest.mark.parametrize(("format", "dtype"), KINDS)
def test_sound_files_are_told_apart_and_read(tmp_path: Path, format: str, dtype: str):
    path = write_file(tmp_path, "a", format, dtype, DOCUMENTS)
    header = read_header(path, raw_dtype=dtype)
    assert (header.format, header.dtype, header.tokens) == (format, dtype, TOKENS)
    check_file(path, format, dtype, TOKENS)
    for make in CORPORA.values():
        found = make(corpus_of(format, dtype, [path], [TOKENS], 251)).read(0, TOKENS)
        assert found.tolist() == [5, 6, 0, 0, 7, 250, 9, 0]
        assert found.dtype == {"uint8": np.uint8, "uint16": np.uint16}.get(dtype, np.int32)


def rewrite(path: str, change: Callable[[bytes], bytes]) -> None:
    Path(path).write_bytes(change(Path(path).read_bytes()))


@pytest.mark.parametrize(("format", "dtype"), KINDS)
@pytest.mark.parametrize("change", ["truncated", "oversized", "empty", "missing", "folder", "pipe"])
def test_files_of_another_size_or_kind_are_refused(tmp_path: Path, format: str, dtype: str, change: str):
    for companion in ("", ".index") if format == "datatrove" else ("", ".idx") if format == "megatron" else ("",):
        path = write_file(tmp_path, "a", format, dtype, DOCUMENTS)
        target = path.replace(".bin", companion) if companion == ".idx" else path + companion
        if change in ("truncated", "oversized", "empty"):
            edit = {"truncated": lambda raw: raw[:-1], "oversized": lambda raw: raw + b"\0", "empty": lambda raw: b""}
            rewrite(target, edit[change])
        else:
            os.unlink(target)
            if change == "folder":
                os.mkdir(target)
            if change == "pipe":
                os.mkfifo(target)
        message = {"missing": "cannot be opened: No such file", "folder": "not a reg", "pipe": "not a reg"}.get(change)
        found = open_errors(path, format, dtype, TOKENS)
        assert len(found) == 1, found
        text = found.pop()
        assert text is not None and text.startswith(f"{target}: ") and (message or "") in text
        if change == "folder":
            os.rmdir(target)
        if change == "pipe":
            os.unlink(target)


def llmc(*header: int) -> Callable[[bytes], bytes]:
    return lambda raw: struct.pack("<3i", *header) + raw[12:]


MAGIC, VERSION = LLMC["uint16"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (llmc(MAGIC, VERSION, 9), "the count of tokens at byte 8 is 9, expected 8"),
        (llmc(MAGIC, VERSION, -8), "the count of tokens at byte 8 is -8, expected 8"),
        (llmc(MAGIC, 2, 8), "the version at byte 4 is 2, expected 1"),
        (llmc(20240801, 7, 8), "the magic number at byte 0 is 20240801, expected 20240520"),
    ],
)
def test_a_lying_llmc_header_is_refused(tmp_path: Path, change: Callable[[bytes], bytes], message: str):
    path = write_file(tmp_path, "a", "llm.c", "uint16", DOCUMENTS)
    rewrite(path, change)
    assert open_errors(path, "llm.c", "uint16", TOKENS) == {f"{path}: {message}"}
    with pytest.raises(DamagedFile):
        read_header(path, "uint16")


def test_a_lying_megatron_index_is_refused_at_first_touch(tmp_path: Path):
    """What constant time can see: tests/data/tokens/test_tokens_megatron.py has the rest."""
    path = write_file(tmp_path, "a", "megatron", "uint16", DOCUMENTS)
    cases = [
        (megatron_index("int32", [3, 1, 4]), "the dtype code at byte 17 is 4, expected 8"),
        (megatron_index("uint16", [3, 1, 5]), "the last offset at byte 62 is 8, expected 6"),
        (megatron_index("uint16", [3, 1, 9]), "the last sequence, at byte 42, has 9 of 8 tokens"),
        (megatron_index("uint16", [3, 1, 0]), "the last offset at byte 62 is 8, expected 16"),
        (megatron_index("uint16", [3, 6, -1]), "the last sequence, at byte 42, has -1 of 8 tokens"),
        (megatron_index("uint16", [3, 2, 4]), "the last offset at byte 62 is 10, expected 8"),
        (
            megatron_index("uint16", [3, 1, 4])[:-1] + b"\x80",
            "the last boundary at byte 94 is -9223372036854775805, exp",
        ),
    ]
    for index, message in cases:
        (tmp_path / "a.idx").write_bytes(index)
        found = open_errors(path, "megatron", "uint16", TOKENS)
        assert len(found) == 1 and f"a.idx: {message}" in str(found.pop())
        with pytest.raises(DamagedFile):
            check_file(path, "megatron", "uint16", TOKENS)


def test_a_lying_datatrove_index_is_refused(tmp_path: Path):
    path = write_file(tmp_path, "a", "datatrove", "uint16", DOCUMENTS)
    index = tmp_path / "a.ds.index"
    for ends, message in [
        ([3, 4, 9], "the end of the last document at byte 16 is 9, expected 8"),
        ([3, 4, 2**64 - 1], "the end of the last document at byte 16 is -1, expected 8"),
    ]:
        index.write_bytes(struct.pack("<3Q", *ends))
        assert open_errors(path, "datatrove", "uint16", TOKENS) == {f"{index}: {message}"}
        with pytest.raises(DamagedFile, match="last document ends at token"):
            read_header(path, "uint16")
    for ends, message in [
        ([5, 4, 8], "the document boundary at byte 8 is 4, expected at least 5"),
        ([3, 9, 8], "the document boundary at byte 16 is 8, expected at least 9"),
        ([2**64 - 1, 4, 8], "the first document ends at token -1"),
    ]:  # only the whole index shows it
        index.write_bytes(struct.pack("<3Q", *ends))
        assert open_errors(path, "datatrove", "uint16", TOKENS) == {None}
        with pytest.raises(DamagedFile, match=message):
            check_file(path, "datatrove", "uint16", TOKENS)


@pytest.mark.parametrize("text", ["", "gpt2|4\n8\n8 T", "gpt2|2\n9\n9 T", "gpt2\n8", "\udcff|\n8"])
def test_lying_metadata_of_datatrove_is_refused(tmp_path: Path, text: str):
    path = write_file(tmp_path, "a", "datatrove", "uint16", DOCUMENTS)
    for good in ("gpt2|2\n8\n8 T", "Unknown Tokenizer|2|2\n8"):
        (tmp_path / "a.ds.metadata").write_text(good)
        read_header(path, "uint16")
    (tmp_path / "a.ds.metadata").write_bytes(text.encode("utf-8", "surrogateescape"))
    for call in (lambda: read_header(path, "uint16"), lambda: check_file(path, "datatrove", "uint16", TOKENS)):
        with pytest.raises(DamagedFile, match=r"metadata: says .* expected \('2', '8'\)"):
            call()
    (tmp_path / "a.ds.metadata").unlink()
    assert read_header(path, "uint16").tokens == 8


def write_empty(folder: Path, format: str) -> Path:
    """A file of no tokens, as the tool that writes the format leaves it."""
    path = folder / ("z.ds" if format == "datatrove" else "z.bin")
    path.write_bytes(struct.pack("<256i", MAGIC, VERSION, 0, *[0] * 253) if format == "llm.c" else b"")
    if format == "megatron":  # an IndexedDatasetBuilder that was given no document
        path.with_suffix(".idx").write_bytes(b"MMIDIDX\x00\x00" + struct.pack("<QBQQq", 1, 8, 0, 1, 0))
    if format == "datatrove":
        (folder / "z.ds.index").write_bytes(b"")
        (folder / "z.ds.metadata").write_text("gpt2|2\n0\n0 T")
    return path


@pytest.mark.parametrize("format", ["raw", "megatron", "llm.c", "datatrove"])
def test_files_of_no_tokens_are_passed_over(tmp_path: Path, format: str):
    path = write_empty(tmp_path, format)
    assert read_header(str(path), "uint16").tokens == 0
    with pytest.raises(InputError, match=r"corpus x: .*/z\.\w+ hold no token; expected some in one file"):
        inspect_files("x", str(path), vocab_size=9, eod_id=0)
    kept, said = write_file(tmp_path, "a", format, "uint16", DOCUMENTS), list[str]()
    corpus = inspect_files("x", str(tmp_path), vocab_size=9, eod_id=0, say=said.append)
    assert (corpus.paths, corpus.tokens, corpus.format) == ((kept,), (TOKENS,), format)
    assert said == [f"note: x: 1 of 2 files hold no token and are passed over: {path} ..."]
    path.write_bytes(path.read_bytes() + b"12")  # the index, or the header, still says that it has none
    if format != "raw":
        with pytest.raises(DamagedFile, match=r"which is not what its size is|has 2 bytes"):
            read_header(str(path), "uint16")


def test_files_of_half_a_token_or_fewer_than_none_are_refused(tmp_path: Path):
    for content, message in [
        (struct.pack("<256i", MAGIC, VERSION, -1, *[0] * 253), "holds -1 tokens, it says"),
        (b"abc", "has 3 bytes, which is no whole number of uint16 ids"),
    ]:
        (tmp_path / "a.bin").write_bytes(content)
        with pytest.raises(DamagedFile, match=message):
            read_header(str(tmp_path / "a.bin"), "uint16")


def test_masks_of_the_loss_are_refused_before_training(tmp_path: Path):
    path = write_file(tmp_path, "a", "datatrove", "uint16", DOCUMENTS)
    (tmp_path / "a.ds.loss").write_bytes(struct.pack("<8?", *[True] * 8))
    with pytest.raises(InputError, match=r"a\.ds\.loss masks targets, which is not supported; without it every token"):
        inspect_files("x", path, vocab_size=9, eod_id=0)
    (tmp_path / "a.ds.loss").unlink()
    assert inspect_files("x", path, vocab_size=9, eod_id=0).tokens == (TOKENS,)


@pytest.mark.parametrize("kind", CORPORA)
@pytest.mark.parametrize(
    ("format", "dtype", "name", "tokens", "vocab_size", "message"),
    [
        ("raw", "uint16", "a.bin", 0, 9, "impossible token count 0"),
        ("raw", "uint16", "a.bin", -3, 9, "impossible token count -3"),
        ("raw", "uint16", "a.bin", 2**62, 9, "impossible token count"),
        ("llm.c", "uint16", "a.bin", 2**62 - 512, 9, "impossible token count"),
        ("megatron", "uint16", "a.ds", 5, 9, "Megatron ends in .bin"),
        ("raw", "uint16", "a.bin", 5, 0, "vocab_size 0"),
        ("raw", "uint16", "a.bin", 5, 2**31 + 1, "vocab_size 2147483649"),
    ],
)
def test_what_no_file_can_be_is_refused_without_touching_one(kind, format, dtype, name, tokens, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        CORPORA[kind](corpus_of(format, dtype, [f"/nowhere/{name}"], [tokens], vocab_size))


def test_the_native_corpus_refuses_what_its_twin_cannot_be_given():
    def make(**changes):
        good = dict(format="raw", item_size=2, paths=["/nowhere/a.bin"], tokens=[5], vocab_size=9)
        return _native.Corpus(**{**good, "cache": _native.FileCache(1), **changes})

    assert len(make()) == 5
    for changes, message in [
        ({"format": "npy"}, 'format "npy"; expected raw, megatron, llm.c or datatrove'),
        ({"item_size": 3}, "ids of 3 bytes; expected 1, 2 or 4"),
        ({"item_size": 1, "format": "llm.c"}, "ids of 1 bytes; expected 2 or 4"),
        ({"paths": [], "tokens": []}, "found 0 files and 0 counts"),
        ({"paths": ["a", "b"]}, "found 2 files and 1 counts"),
        ({"paths": ["a", "b", "c"], "tokens": [2**61 - 1] * 3}, "the corpus is too large"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(**changes)
    with pytest.raises(TypeError):
        make(cache=None)
    with pytest.raises(ValueError, match="at least 1 file"):
        _native.FileCache(0)


def test_a_machine_without_files_to_open_does_not_make_a_file_damaged(tmp_path: Path):
    path = write_file(tmp_path, "a", "raw", "uint16", DOCUMENTS)
    corpora = [make(corpus_of("raw", "uint16", [path], [TOKENS], 251)) for make in CORPORA.values()]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        for corpus in corpora:
            with pytest.raises((OSError, RuntimeError), match="Too many open files") as raised:
                corpus.read(0, 1)
            assert not isinstance(raised.value, (DamagedFile, _native.DamagedFile))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(lowest_free)
    assert isinstance(corpora[0], NativeCorpus)
    assert [corpus.read(0, 2).tolist() for corpus in corpora] == [[5, 6], [5, 6]]
