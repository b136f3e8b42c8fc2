"""A save is whole or was never there, on whatever ranks, wherever it is killed."""

from __future__ import annotations

import errno
import json
import os
import stat
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from checkpoint_helpers import MODEL, Tensors, make_tensors, pieces_of, same, save, slice_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from small_disk import small_disk
from states import state_of

from llm.checkpoint import writer
from llm.checkpoint.manifest import KINDS, Piece
from llm.checkpoint.reader import find_latest, open_checkpoint, verify
from llm.errors import CheckpointError
from llm.slices import Slice

OLD, NEW = make_tensors(1), make_tensors(2)
LAYOUTS = st.tuples(st.sampled_from([1, 2, 3, 4]), st.sampled_from([1, 2, 3]))


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(layout=LAYOUTS, other=LAYOUTS, shard_bytes=st.sampled_from([1, 100, 1 << 20]))
def test_any_layout_reads_any_other(
    layout: tuple[int, int],
    other: tuple[int, int],
    shard_bytes: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    root = tmp_path_factory.mktemp("checkpoints")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "SHARD_BYTES", shard_bytes)
        patch.setattr(writer.files, "CHUNK", 48)  # of which a tensor has several, and the last is short
        assert set(save(root, 7, NEW, tp=layout[0], dp=layout[1])) == {root / "step-00000007"}
    verify(root / "step-00000007")
    reader = open_checkpoint(root / "step-00000007")
    assert reader.state == state_of(7)
    assert {name for name, _ in reader.manifest.tensors} == set(MODEL)
    assert same(reader, NEW)
    for name, (shape, _) in MODEL.items():
        assert reader.shape(name) == shape
        for tp_rank in range(other[0]):
            part = slice_of(name, tp_rank, other[0])
            for kind in KINDS:
                found, expected = reader.read_slice(name, kind, part), part.take(NEW[name, kind])
                assert torch.equal(found, expected), (name, kind, part)
                start, length = part.numel // 3, part.numel // 2
                range_of_it = reader.read_range(name, kind, part, start, length)
                assert torch.equal(range_of_it, expected.flatten()[start : start + length]), (name, kind, part)


def test_any_slice_of_any_dimension(tmp_path: Path) -> None:
    save(tmp_path, 1, NEW, tp=2, dp=3)
    reader = open_checkpoint(tmp_path / "step-00000001")
    for name, (shape, _) in MODEL.items():
        for dim, size in enumerate(shape):
            for start in range(size):
                for stop in range(start + 1, size + 1):
                    part = Slice(shape, dim, start, stop)
                    found = reader.read_slice(name, "master", part)
                    assert torch.equal(found, part.take(NEW[name, "master"])), (name, part)


def test_shards_are_plain_safetensors(tmp_path: Path) -> None:
    save(tmp_path, 1, NEW)
    path = tmp_path / "step-00000001" / "rank-00000-00000.safetensors"
    tensors = load_file(path)
    assert torch.equal(tensors["master/norm.weight/0:4/0"], NEW["norm.weight", "master"])
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0  # the tensors are aligned


def test_the_manifest_has_the_hash_of_every_file(tmp_path: Path) -> None:
    save(tmp_path, 1, NEW, dp=2)
    folder = tmp_path / "step-00000001"
    body = json.loads((folder / "manifest.json").read_bytes())
    contents = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
    assert body["version"] == 2 and len(contents) == 3
    assert body["files"] == {
        name: {"size": len(content), "xxh128": xxhash.xxh3_128_hexdigest(content)} for name, content in contents.items()
    }


def test_only_the_owner_can_read(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    previous = os.umask(0)
    try:
        save(root, 1, NEW, tp=2)
    finally:
        os.umask(previous)
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    for path in root.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_keeps_the_last_and_puts_an_abandoned_future_aside(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, NEW)
    assert names(tmp_path) == {"step-00000002", "step-00000003", "latest"}
    assert (tmp_path / "latest").read_text() == "step-00000003\n"
    (tmp_path / "step-99999999").mkdir()  # as a damaged one, from which the run could not resume
    save(tmp_path, 100000001, NEW)  # one digit more than the others
    said: list[str] = []
    save(tmp_path, 4, OLD, keep_last=1, say=said.append)
    left = {"step-99999999.aside-1", "step-100000001.aside-1"}
    assert names(tmp_path) == {"step-00000004", "latest", *left}
    assert same(open_checkpoint(tmp_path / "step-00000004"), OLD)
    assert same(open_checkpoint(tmp_path / "step-100000001.aside-1"), NEW)
    assert len(said) == 2 and all("went back, and has saved step 4 since" in text for text in said)
    assert {name for name in left for text in said if f"is kept as {name}" in text} == left


def test_saving_a_step_again_keeps_both(tmp_path: Path) -> None:
    """A run does so only after it went back: what it left may be what someone wants."""
    save(tmp_path, 5, OLD, tp=2)
    assert save(tmp_path, 5, NEW) == [tmp_path / "step-00000005"]
    assert names(tmp_path) == {"step-00000005", "step-00000005.aside-1", "latest"}
    assert same(open_checkpoint(tmp_path / "step-00000005"), NEW)
    assert same(open_checkpoint(tmp_path / "step-00000005.aside-1"), OLD)
    save(tmp_path, 5, OLD)
    assert same(open_checkpoint(tmp_path / "step-00000005.aside-2"), NEW)
    assert find_latest(tmp_path) == (tmp_path / "step-00000005", [])


def test_writes_that_take_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:700]))
        save(tmp_path, 1, NEW)
    assert find_latest(tmp_path) == (tmp_path / "step-00000001", [])


def test_a_replaced_checkpoint_without_an_heir_counts(tmp_path: Path) -> None:
    save(tmp_path, 1, OLD)
    (tmp_path / "step-00000001").rename(tmp_path / "step-00000001.old")  # a crash came here

    def pieces(*arguments: Any) -> Iterator[Piece]:
        assert find_latest(tmp_path) == (tmp_path / "step-00000001.old", [])
        yield from pieces_of(*arguments)

    save(tmp_path, 2, NEW, pieces=pieces)
    assert names(tmp_path) == {"step-00000001.old", "step-00000002", "latest"}
    save(tmp_path, 1, NEW, pieces=pieces_of)
    assert names(tmp_path) == {"step-00000001", "step-00000001.aside-1", "step-00000002.aside-1", "latest"}
    assert same(open_checkpoint(tmp_path / "step-00000001"), NEW)


def test_a_file_that_rank_0_does_not_see_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, OLD)
    together, agreements = writer.together, 0

    def agree(action: Callable[[], Any], group: Any) -> Any:
        nonlocal agreements
        found = together(action, group)
        agreements += 1
        if agreements == 2:  # every rank has written
            os.truncate(tmp_path / "step-00000002.tmp" / "rank-00000-00000.safetensors", 100)
        return found

    monkeypatch.setattr(writer, "together", agree)
    refused(save(tmp_path, 2, NEW), "has 100 bytes")
    check_untouched(tmp_path)


def test_what_a_crash_left_goes_first(tmp_path: Path) -> None:
    for name in ("step-00000001.tmp", "step-00000007.tmp", "step-00000003.old.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank-00000-00000.safetensors").touch()

    def pieces(*arguments: Any) -> Iterator[Piece]:
        assert names(tmp_path) == {"step-00000001.tmp"}
        assert names(tmp_path / "step-00000001.tmp") == set()
        yield from pieces_of(*arguments)

    assert save(tmp_path, 1, NEW, pieces=pieces) == [tmp_path / "step-00000001"]


def refused(results: list[Any], *words: str) -> None:
    """Every rank raised the same CheckpointError, which says these words."""
    assert all(isinstance(result, CheckpointError) for result in results), results
    assert len({str(result) for result in results}) == 1
    for word in words:
        assert word in str(results[0])


def check_untouched(root: Path) -> None:
    """Only the checkpoint of step 1 is there, whole."""
    assert names(root) == {"step-00000001", "latest"}
    folder, warnings = find_latest(root)
    assert folder is not None
    assert folder.name == "step-00000001"
    assert not warnings
    assert same(open_checkpoint(folder), OLD)


def test_a_full_disk_on_one_rank_stops_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, OLD, tp=2, dp=2)
    write, fired = os.write, []

    def full(descriptor: int, data: memoryview) -> int:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if "rank-00002" in path:
            fired.append(path)
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", full)
    results = save(tmp_path, 2, NEW, tp=2, dp=2)
    assert len(fired) == 1
    refused(results, "disk is full", "rank-00002-00000.safetensors", "bytes", "are free")
    check_untouched(tmp_path)


def test_a_truly_full_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path, "256k"):
        save(tmp_path, 1, OLD, dp=2)
        big = Slice.full((100_000,))

        def large(tensors: Tensors, rank: int, tp: int, dp: int) -> Iterator[Piece]:
            yield Piece("big", "master", big, rank * 25_000, torch.ones(25_000))

        for _ in range(2):  # what a failure left would take the room of the next
            refused(save(tmp_path, 2, NEW, dp=4, pieces=large), "disk is full", "bytes")
            check_untouched(tmp_path)
        save(tmp_path, 2, NEW, dp=2)
        assert find_latest(tmp_path) == (tmp_path / "step-00000002", [])


@pytest.mark.parametrize("call", ["fsync", "rename", "replace"])
def test_an_io_error_stops_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    save(tmp_path, 1, OLD, tp=2)

    def broken(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, broken)
        refused(save(tmp_path, 2, NEW, tp=2), "Input/output error")
    assert not [name for name in names(tmp_path) if name.startswith("step-") and "." in name]
    folder, warnings = find_latest(tmp_path)
    assert not warnings
    assert folder == tmp_path / ("step-00000002" if call == "replace" else "step-00000001")
    save(tmp_path, 2, NEW, tp=2)
    assert same(open_checkpoint(tmp_path / "step-00000002"), NEW)


def lose(pieces: list[Piece]) -> list[Piece]:
    return pieces[1:]


def double(pieces: list[Piece]) -> list[Piece]:
    first = pieces[0]
    return [*pieces, Piece(first.name, first.kind, Slice.full((11, 4)), 0, torch.ones(44))]


def overrun(pieces: list[Piece]) -> list[Piece]:
    first = pieces[0]
    extra = torch.ones(first.slice.numel - first.start + 1)
    return [Piece(first.name, first.kind, first.slice, first.start, extra), *pieces[1:]]


def wrong_dtype(pieces: list[Piece]) -> list[Piece]:
    first = pieces[0]
    return [Piece(first.name, first.kind, first.slice, first.start, first.data.half()), *pieces[1:]]


def fail(pieces: list[Piece]) -> list[Piece]:
    raise RuntimeError("out of memory")


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lose, "make it up exactly"),
        (double, "make it up exactly"),
        (overrun, "do not lie in its slice"),
        (wrong_dtype, "float16"),
        (fail, "out of memory"),
    ],
)
def test_a_wrong_set_of_pieces_is_not_saved(
    tmp_path: Path, break_it: Callable[[list[Piece]], list[Piece]], words: str
) -> None:
    save(tmp_path, 1, OLD, tp=2, dp=2)

    def pieces(tensors: Tensors, rank: int, tp: int, dp: int) -> Iterator[Piece]:
        found = list(pieces_of(tensors, rank, tp, dp))
        yield from break_it(found) if rank == 1 else found

    refused(save(tmp_path, 2, NEW, tp=2, dp=2, pieces=pieces), words)
    check_untouched(tmp_path)


def test_pieces_are_not_gathered_beyond_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SHARD_BYTES", 4000)
    living: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def pieces(tensors: Tensors, rank: int, tp: int, dp: int) -> Iterator[Piece]:
        nonlocal most
        for number in range(20):
            data = torch.ones(500)
            living.add(data)
            most = max(most, len(living))
            yield Piece(f"p{number}", "master", Slice.full((500,)), 0, data)
            del data

    assert save(tmp_path, 1, NEW, pieces=pieces) == [tmp_path / "step-00000001"]
    assert most <= 4  # two in the shard, the one that does not fit, the one being made


def test_all_is_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 0, OLD)
    events: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def recorded(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(first: Any, *rest: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{first}") if name == "fsync" else str(first)
            events.append((name, path))
            if name == "rename":  # what is in the folder then is all there is to be
                events.extend(("present", str(inside)) for inside in Path(path).iterdir())
            return call(first, *rest)

        return wrapper

    monkeypatch.setattr(os, "fsync", recorded("fsync", fsync))
    monkeypatch.setattr(os, "rename", recorded("rename", rename))
    monkeypatch.setattr(os, "replace", recorded("replace", replace))
    save(tmp_path, 1, NEW, tp=2, dp=2, keep_last=1)
    partial = str(tmp_path / "step-00000001.tmp")
    renamed = events.index(("rename", partial))
    synced = {path for name, path in events[:renamed] if name == "fsync"}
    present = {path for name, path in events if name == "present" and path.startswith(partial)}
    assert len(present) == 4 + 2
    assert present < synced
    assert events[renamed - 1] == ("fsync", partial)
    after = [event for event in events[renamed + 1 :] if event[0] != "present"]
    pointer = str(tmp_path / "latest.tmp")
    root = ("fsync", str(tmp_path))
    deleted = ("rename", str(tmp_path / "step-00000000"))
    assert after == [root, ("fsync", pointer), ("replace", pointer), root, deleted, root]
