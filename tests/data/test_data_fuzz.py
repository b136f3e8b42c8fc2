"""Whatever bytes a token file and its index hold, they are refused or read exactly, and memory stays sound."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from token_files import CORPORA, KINDS, corpus_of, failure, write_file

from llm.data.format_headers import index_path
from llm.data.shards import check_file, document_lengths, inspect_files
from llm.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 20
FORMATS = ["raw", "megatron", "llm.c", "datatrove"]  # as in csrc/core/token_file.h
DOCUMENTS = [[1, 2, 0], [0], [5, 6, 7, 0]]


def write_seeds(folder: Path) -> None:
    """Sound files of every kind, as inputs of csrc/tests/fuzz_headers.cpp."""
    folder.mkdir()
    for i, (format, dtype) in enumerate(KINDS):
        path = write_file(folder.parent, f"seed{i}", format, dtype, DOCUMENTS)
        index = index_path(path, format)
        raw = Path(path).read_bytes()
        width = {1: 0, 2: 1, 4: 2}[np.dtype(dtype).itemsize]
        head = struct.pack("<BBBqH", FORMATS.index(format), width, 3, 8, len(raw))
        (folder / f"{i}").write_bytes(head + raw + (Path(index).read_bytes() if index else b""))


def build(tmp_path: Path, *changes: str) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ was not found")
    flags = ["-std=c++17", "-O1", "-g", "-pthread", f"-I{ROOT / 'csrc'}", "-DINGOT_FUZZ_DRIVER", *changes]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-D_GLIBCXX_ASSERTIONS"]
    (tmp_path / "empty.cpp").write_text("int main() {}\n")
    for command in ([compiler, *flags, "empty.cpp", "-o", "empty"], ["./empty"]):
        probe = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        if probe.returncode != 0:  # no libraries, or a kernel that they cannot run on
            pytest.skip(f"the sanitizers do not work here: {probe.stderr.strip()[-200:]}")
    sources = [ROOT / "csrc" / name for name in ("core/token_file.cpp", "core/corpus.cpp", "tests/fuzz_headers.cpp")]
    coverage = "-fsanitize-coverage=trace-pc"
    subprocess.run([compiler, *flags, coverage, *map(str, sources), "-o", "fuzz"], check=True, cwd=tmp_path)
    return tmp_path / "fuzz"


def test_headers_and_indexes_under_the_sanitizers(tmp_path: Path):
    fuzz = build(tmp_path)
    write_seeds(tmp_path / "seeds")
    failed = tmp_path / "failed"
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:  # no disk
        result = subprocess.run(
            [str(fuzz), "seeds", str(SECONDS), str(failed)],
            cwd=tmp_path,
            env={**os.environ, "ASAN_OPTIONS": "handle_abort=1", "TMPDIR": folder},
            capture_output=True,
            text=True,
            timeout=10 * SECONDS,
        )
    found = failed.read_bytes().hex() if failed.exists() else ""
    assert result.returncode == 0, f"{result.stderr[-4000:]}\ninput: {found}"
    runs, new = (int(word) for word in result.stdout.split() if word.isdigit())
    assert runs > 1000 and new > 10, result.stdout


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
