"""Copies of remote corpora: whole and checked, whatever happens on the way."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from conftest import write_shards
from fsspec.implementations.memory import MemoryFileSystem

from llm.config import DataConfig, ModelConfig, RunConfig
from llm.data.corpora import Corpora
from llm.data.prepare import fetch as remote
from llm.data.prepare.fetch import fetch, fetch_corpora
from llm.data.tokens.folder import copy_folder
from llm.data.tokens.hashes import check_hashes
from llm.data.tokens.manifest import FileEntry, Manifest, read_manifest
from llm.errors import InputError

URL = "memory://bucket/corpus"
PIECE = 4096  # bytes of a request in these tests


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    """A prepared folder of two splits, 60 kB."""
    tokens = np.random.default_rng(0).integers(0, 500, 30_000)
    write_shards(tmp_path / "origin", {"train": tokens[:25_000], "validation": tokens[25_000:]}, 500)
    return tmp_path / "origin"


@pytest.fixture(autouse=True)
def bucket(origin: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryFileSystem]:
    """The same under URL."""
    monkeypatch.setattr(remote, "PIECE", PIECE)
    system = fsspec.filesystem("memory")
    system.put(str(origin), "/bucket/corpus", recursive=True)
    yield system
    system.rm("/bucket", recursive=True)


def is_full(folder: Path, origin: Path) -> bool:
    check_hashes(folder, read_manifest(folder))
    (folder / ".lock").unlink(missing_ok=True)
    return {p.name: p.read_bytes() for p in folder.iterdir()} == {p.name: p.read_bytes() for p in origin.iterdir()}


class Requests:
    """Stands in for MemoryFileSystem.cat_file: remembers the ranges asked for and may spoil the answers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[int, bytes], bytes] | None = None) -> None:
        self.ranges: list[tuple[str, int, int]] = []
        real = MemoryFileSystem.cat_file

        def cat_file(system, path, start=None, end=None, **kwargs):
            found = real(system, path, start=start, end=end, **kwargs)
            if start is None:  # the manifest
                return found
            self.ranges.append((path.rsplit("/", 1)[-1], start, end))
            return spoil(len(self.ranges), found) if spoil else found

        monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)


def test_a_copy_is_whole_and_made_once(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    requests, stages = Requests(monkeypatch), []
    folder = tmp_path / "cache/copy"
    assert fetch(URL, folder, lambda *stage: stages.append(stage)) == read_manifest(origin)
    assert is_full(folder, origin)
    total = sum(entry.bytes for entry in read_manifest(origin).all_files().values())
    assert stages[-1] == (f"copying {URL}", total, total)
    assert [stage[1] for stage in stages] == sorted(stage[1] for stage in stages)
    asked = sorted(requests.ranges)
    assert [r for r in asked if r[0] == "train.bin"] == [
        ("train.bin", i, min(i + PIECE, 50_000)) for i in range(0, 50_000, PIECE)
    ]
    fetch(URL, folder)
    assert sorted(requests.ranges) == asked


def fail_at(n: int) -> Callable[[int, bytes], bytes]:
    def spoil(request: int, found: bytes) -> bytes:
        if request >= n:
            raise ConnectionResetError("connection reset by peer")
        return found

    return spoil


def bytes_in(folder: Path) -> int:
    """Of the corpus, whole or in part."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.name != ".lock")


@pytest.mark.parametrize("n", [1, 2, 7, 14])
def test_an_interrupted_transfer_goes_on(origin: Path, tmp_path: Path, n: int):
    folder = tmp_path / "copy"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "STREAMS", 1)
        Requests(patch, fail_at(n))
        with pytest.raises(InputError, match=r"cannot be read: ConnectionResetError.*run again to go on from there"):
            fetch(URL, folder)
    assert not (folder / "manifest.json").exists()
    kept = bytes_in(folder)
    assert kept >= (n - 1) * 16  # the smallest file has less than a piece
    with pytest.MonkeyPatch.context() as patch:
        Requests(patch, fail_at(1))
        with pytest.raises(InputError, match="cannot be read"):
            fetch(URL, folder)
    assert bytes_in(folder) == kept
    with pytest.MonkeyPatch.context() as patch:
        requests = Requests(patch)
        fetch(URL, folder)
    asked = sum(stop - start for _, start, stop in requests.ranges)
    total = sum(entry.bytes for entry in read_manifest(origin).all_files().values())
    assert asked == total - kept
    assert is_full(folder, origin)


def test_after_a_failure_the_other_streams_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real, asked = MemoryFileSystem.cat_file, []

    def cat_file(system, path, start=None, end=None):
        if path.endswith("tokenizer.json"):
            raise PermissionError("not yours")
        if path.endswith("train.bin"):
            time.sleep(0.1)
            asked.append(start)
        return real(system, path, start=start, end=end)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    with pytest.raises(InputError, match=r"tokenizer\.json cannot be read: PermissionError: not yours"):
        fetch(URL, tmp_path / "copy")
    assert len(asked) < 12  # of 13 pieces


def test_bits_that_flip_on_the_way(origin: Path, tmp_path: Path):
    folder = tmp_path / "copy"
    with pytest.MonkeyPatch.context() as patch:
        Requests(patch, lambda n, found: bytes([found[0] ^ 1]) + found[1:] if n == 3 else found)
        with pytest.raises(InputError, match=r"of what came, its manifest says .* run again to copy it anew"):
            fetch(URL, folder)
    fetch(URL, folder)
    assert is_full(folder, origin)


@pytest.mark.parametrize("spoil", [lambda n, found: found[:-1], lambda n, found: found * 2], ids=["short", "no ranges"])
def test_answers_of_another_length_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil):
    Requests(monkeypatch, spoil)
    with pytest.raises(InputError, match=r"bytes came from 0 on, \d+ were asked for"):
        fetch(URL, tmp_path / "copy")


def test_what_lies_there_already_is_not_trusted(origin: Path, tmp_path: Path):
    """Files and parts of an earlier transfer, of other contents than now, with the right and with wrong sizes."""
    folder = tmp_path / "copy"
    folder.mkdir()
    (folder / "train.bin").write_bytes(bytes(50_000))
    (folder / "train.idx").write_bytes(b"x")
    (folder / "validation.bin.part").write_bytes(bytes(99_999))
    (folder / "validation.idx.part").write_bytes(b"x")
    stages = []
    fetch(URL, folder, lambda *stage: stages.append(stage))
    assert is_full(folder, origin)
    total = stages[-1][2]
    assert stages[-1][1] == total


def test_a_remote_folder_that_changed(bucket: MemoryFileSystem, origin: Path, tmp_path: Path):
    folder = tmp_path / "copy"
    before = fetch(URL, folder)
    plan = FileEntry(4, "ab" * 32)
    (folder / "train.16.plan").write_bytes(b"plan")
    planned = dataclasses.replace(before, files=before.files | {"train.16.plan": plan})
    planned.save(folder)
    assert fetch(URL, folder) == planned  # a plan of our own is no change
    dataclasses.replace(before, source="another text").save(origin)
    bucket.put(str(origin / "manifest.json"), "/bucket/corpus/manifest.json")
    with pytest.raises(InputError, match=f"{URL} is not what it was when .*copy was copied; remove that folder"):
        fetch(URL, folder)


def test_a_copy_that_lost_something(tmp_path: Path):
    folder = tmp_path / "copy"
    fetch(URL, folder)
    os.truncate(folder / "train.bin", 7)
    with pytest.raises(InputError, match=r"train\.bin has 7 bytes; the manifest says 50000"):
        fetch(URL, folder)
    (folder / "train.bin").unlink()
    with pytest.raises(InputError, match=r"train\.bin is missing; the manifest says 50000"):
        fetch(URL, folder)


def put_manifest(bucket: MemoryFileSystem, origin: Path, change: Callable[[Manifest], Manifest]) -> None:
    change(read_manifest(origin)).save(origin)
    bucket.put(str(origin / "manifest.json"), "/bucket/corpus/manifest.json")


def test_what_cannot_be_copied_is_explained(bucket: MemoryFileSystem, origin: Path, tmp_path: Path):
    folder = tmp_path / "copy"
    for url, message in [
        ("memory://bucket/nothing", r"nothing/manifest\.json cannot be read: FileNotFoundError"),
        ("nosuch://bucket/x", "nosuch://bucket/x cannot be opened: Protocol not known"),
    ]:
        with pytest.raises(InputError, match=message):
            fetch(url, folder)
    bucket.pipe_file("/bucket/corpus/manifest.json", b"{}")
    with pytest.raises(InputError, match=r"corpus/manifest\.json: format is None"):
        fetch(URL, folder)
    outside = FileEntry(1, "ab" * 32)
    put_manifest(bucket, origin, lambda m: dataclasses.replace(m, files=m.files | {"/etc/passwd": outside}))
    with pytest.raises(InputError, match="it lists /etc/passwd, which lies outside its folder"):
        fetch(URL, folder)
    assert not folder.exists()


@pytest.mark.parametrize(
    "names", [("a", "a/b"), ("a/b", "a/b/c/d"), ("a", "a.part"), ("a", "a.part/b"), ("manifest.json",)]
)
def test_names_that_clash_are_refused_first(
    bucket: MemoryFileSystem, origin: Path, tmp_path: Path, names: tuple[str, ...]
):
    plain = json.loads((origin / "manifest.json").read_bytes())
    plain["files"] |= {name: {"bytes": 1, "sha256": "ab" * 32} for name in names}
    bucket.pipe_file("/bucket/corpus/manifest.json", json.dumps(plain).encode())
    with pytest.raises(InputError, match="listed"):
        fetch(URL, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b'{"format": 1, "format": 2}', b'{"format": NaN}', b" " * (1 << 26) + b"{}"]
)
def test_hostile_manifests_are_refused(bucket: MemoryFileSystem, tmp_path: Path, text: bytes):
    bucket.pipe_file("/bucket/corpus/manifest.json", text)
    with pytest.raises(InputError, match=r"manifest\.json"):
        fetch(URL, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_damaged_remote_file_is_never_taken(bucket: MemoryFileSystem, tmp_path: Path):
    folder = tmp_path / "copy"
    raw = bytearray(bucket.cat_file("/bucket/corpus/train.bin"))
    raw[40_000] ^= 4
    bucket.pipe_file("/bucket/corpus/train.bin", bytes(raw))
    for _ in range(2):
        with pytest.raises(InputError, match=r"train\.bin: sha256 .* the file is damaged there"):
            fetch(URL, folder)
        assert not (folder / "train.bin").exists()
        assert not (folder / "manifest.json").exists()


def test_the_corpora_of_a_config(origin: Path, tmp_path: Path):
    blend = {URL: 1.0, f"file://{origin}": 1.0, str(origin): 1.0}
    data = DataConfig(path=URL, cache=str(tmp_path / "cache"), seq_len=16, blend=blend)
    config = RunConfig(model=ModelConfig(vocab_size=500), data=data)
    fetch_corpora(config)
    found = Corpora.open(config).training
    assert set(found) == set(blend)
    assert {Path(corpus.shards.paths[0]).read_bytes() for corpus in found.values()} == {
        (origin / "train.bin").read_bytes()
    }
    assert is_full(copy_folder(config, URL), origin)


SCRIPT = """
import sys, time
from pathlib import Path
from fsspec.implementations.local import LocalFileSystem
from llm.data.prepare import fetch as remote
remote.PIECE, real, asked = 4096, LocalFileSystem.cat_file, []
def slow(*args, start=None, **kwargs):
    time.sleep(0.03)
    asked.append(start)
    return real(*args, start=start, **kwargs)
LocalFileSystem.cat_file = slow
remote.fetch(sys.argv[1], Path(sys.argv[2]))
print(sum(start is not None for start in asked))
"""


def start_copying(origin: Path, folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT, f"file://{origin}", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3])


def test_several_processes_copy_once(origin: Path, tmp_path: Path):
    folder = tmp_path / "copy"
    running = [start_copying(origin, folder) for _ in range(3)]
    requests = sorted(int(process.communicate(timeout=60)[0]) for process in running)
    assert [process.returncode for process in running] == [0, 0, 0]
    assert requests[:2] == [0, 0]
    assert requests[2] > 10
    assert is_full(folder, origin)


def test_a_killed_process_leaves_what_the_next_goes_on_with(origin: Path, tmp_path: Path):
    folder = tmp_path / "copy"
    process = start_copying(origin, folder)
    deadline = time.monotonic() + 60
    while not list(folder.glob("*.bin*")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / "manifest.json").exists()
    fetch(f"file://{origin}", folder)
    assert is_full(folder, origin)
