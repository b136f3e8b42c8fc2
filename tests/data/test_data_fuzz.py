"""Whatever bytes a token file and its index hold, they are refused or read exactly, and memory stays sound."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from fuzzing import build, fuzz
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from token_files import CORPORA, KINDS, corpus_of, failure, write_file

from llm.data.samples.packing import HEADER, MAGIC, VERSION
from llm.data.tokens.headers import index_path
from llm.data.tokens.shards import check_file, document_lengths, inspect_files
from llm.errors import InputError

SECONDS = 10
FORMATS = ["raw", "megatron", "llm.c", "datatrove"]  # as in csrc/core/token_file.h
PLAN = len(FORMATS)  # as in csrc/tests/fuzz_headers.cpp
DOCUMENTS = [[1, 2, 0], [0], [5, 6, 7, 0]]


def write_seeds(folder: Path) -> None:
    """Sound files of every kind and a sound plan, as inputs of csrc/tests/fuzz_headers.cpp."""
    folder.mkdir()
    for i, (format, dtype) in enumerate(KINDS):
        path = write_file(folder.parent, f"seed{i}", format, dtype, DOCUMENTS)
        index = index_path(path, format)
        raw = Path(path).read_bytes()
        width = {1: 0, 2: 1, 4: 2}[np.dtype(dtype).itemsize]
        head = struct.pack("<BBBqH", FORMATS.index(format), width, 3, 8, len(raw))
        (folder / f"{i}").write_bytes(head + raw + (Path(index).read_bytes() if index else b""))
    plan = HEADER.pack(MAGIC, VERSION, 3, 8, 2, 3, 8) + np.array([3, 1, 0, 3, 4, 4, 2, 3], "<i8").tobytes()
    (folder / "plan").write_bytes(struct.pack("<BBBqH", PLAN, 3, 3, 8, len(plan)) + plan)


@pytest.mark.slow
def test_headers_and_indexes_under_libfuzzer(tmp_path: Path, request: pytest.FixtureRequest):
    wanted = request.config.getoption("--fuzz-seconds", default=None)
    names = [*(f"core/{name}.cpp" for name in ("token_file", "corpus", "packing", "sums")), "tests/fuzz_headers.cpp"]
    why_not = build(tmp_path, names)
    if why_not:
        assert wanted is None, why_not
        pytest.skip(why_not)
    write_seeds(tmp_path / "seeds")
    assert fuzz(tmp_path, int(wanted or SECONDS)) > 1000


@given(data=st.data())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_both_corpora_and_the_full_check_agree(tmp_path: Path, data: st.DataObject):
    """The twins refuse the same files in the same words; the full check refuses no less; nothing else is raised."""
    format, dtype = data.draw(st.sampled_from(KINDS))
    path = write_file(tmp_path, "a", format, dtype, DOCUMENTS)
    (tmp_path / "a.ds.metadata").unlink(missing_ok=True)
    target = Path(data.draw(st.sampled_from([path, index_path(path, format) or path])))
    raw = bytearray(target.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, min(len(raw) - 1, 120)))
        some = bytes([data.draw(st.integers(0, 255))]) * data.draw(st.sampled_from([1, 4, 8]))
        raw[at : at + len(some)] = some
    target.write_bytes(raw[: data.draw(st.integers(0, len(raw)) | st.just(len(raw)))])
    corpus = corpus_of(format, dtype, [path], [8], 8)
    messages = {failure(lambda make=make: make(corpus).read(0, 8)) for make in CORPORA.values()}
    assert len(messages) == 1
    accepted = failure(lambda: check_file(path, format, dtype, 8)) is None
    if accepted:
        message = messages.pop()
        assert message is None or "expected ids below 8" in message
    try:
        found = inspect_files("x", path, vocab_size=8, eod_id=0, raw_dtype=dtype)
        lengths = np.concatenate(list(document_lengths(found)))
        assert lengths.min() >= 0 and lengths.sum() == found.n_tokens
    except InputError:
        pass
