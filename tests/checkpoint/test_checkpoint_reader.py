"""Nothing damaged, foreign or hostile is taken for a checkpoint; the one before it is."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint_helpers import make_tensors, same, save
from thread_ranks import on_thread_ranks

from llm.checkpoint.manifest import Manifest
from llm.checkpoint.reader import find_latest, find_named, open_agreed, open_checkpoint, tokenizer_of, verify
from llm.errors import Agreed, CheckpointError, InputError
from llm.slices import Slice

OLD, NEW = make_tensors(1), make_tensors(2)
SHARD = "rank-00001-00000.safetensors"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Checkpoints of steps 1 (OLD) and 2 (NEW), each by two ranks."""
    save(tmp_path, 1, OLD, dp=2)
    save(tmp_path, 2, NEW, dp=2)
    return tmp_path


def truncate(folder: Path) -> None:
    os.truncate(folder / SHARD, (folder / SHARD).stat().st_size - 1)


def flip_tensor_bit(folder: Path) -> None:
    flip(folder / SHARD, -1)


def flip_state_bit(folder: Path) -> None:
    flip(folder / "state.json", 5)


def lose_shard(folder: Path) -> None:
    (folder / SHARD).unlink()


def lose_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def link_shard(folder: Path) -> None:
    (folder / SHARD).rename(folder.parent / SHARD)
    (folder / SHARD).symlink_to(folder.parent / SHARD)


def link_manifest(folder: Path) -> None:
    (folder / "manifest.json").rename(folder.parent / "manifest.json")
    (folder / "manifest.json").symlink_to(folder.parent / "manifest.json")


def link_folder(folder: Path) -> None:
    folder.rename(folder.parent / "elsewhere")
    folder.symlink_to(folder.parent / "elsewhere")


def pipe_shard(folder: Path) -> None:
    (folder / SHARD).unlink()
    os.mkfifo(folder / SHARD)


def mix_steps(folder: Path) -> None:
    shutil.copy(folder.parent / "step-00000001" / SHARD, folder / SHARD)


def rename_step(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "step-00000001", folder)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "bytes; expected"),
        (flip_tensor_bit, "is damaged"),
        (flip_state_bit, "is damaged"),
        (lose_shard, "No such file"),
        (lose_manifest, "No such file"),
        (link_shard, "not a regular file"),
        (link_manifest, "not a regular file"),
        (link_folder, "not a folder"),
        (pipe_shard, "not a regular file"),
        (mix_steps, "is damaged"),
        (rename_step, "step 1"),
    ],
)
def test_a_damaged_checkpoint_falls_back(root: Path, damage: Callable[[Path], None], words: str) -> None:
    assert find_latest(root) == (root / "step-00000002", [])
    damage(root / "step-00000002")
    folder, warnings = find_latest(root)
    assert folder is not None
    assert folder.name == "step-00000001"
    assert same(open_checkpoint(folder), OLD)
    (warning,) = warnings
    assert "step-00000002" in warning
    assert words in warning
    with pytest.raises(CheckpointError, match=words):
        verify(root / "step-00000002")
    (folder / "manifest.json").unlink()
    with pytest.raises(InputError, match="move the folder away"):
        find_latest(root)


@pytest.mark.parametrize("name", ["step-00000001.bak", "best", "step-1", "step-00000001"])
def test_a_copied_checkpoint_is_read_by_any_name(root: Path, name: str) -> None:
    """But not by that of another step, and in a run's folder only by its own."""
    copy = root / "copies" / name
    shutil.copytree(root / "step-00000001", copy)
    (copy / "tokenizer.json").touch()
    assert find_named(copy) == (copy, [])
    assert same(open_checkpoint(copy), OLD)
    if name != "step-00000001":
        shutil.copytree(root / "step-00000002", root / name)
        assert find_latest(root) == (root / "step-00000002", [])
    shutil.copytree(copy, root / "copies/step-00000002")
    with pytest.raises(InputError, match="holds a checkpoint of step 1"):
        find_named(root / "copies/step-00000002")


def test_a_tokenizer_is_found_in_the_folder_and_two_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tmp_path / "runs/one/checkpoints/step-00000001"
    checkpoint.mkdir(parents=True)
    (tmp_path / "runs/tokenizer.json").touch()
    assert tokenizer_of(checkpoint) is None
    for folder in (checkpoint.parent.parent, checkpoint.parent, checkpoint):
        (folder / "tokenizer.json").touch()
        assert tokenizer_of(checkpoint) == folder / "tokenizer.json"
    monkeypatch.chdir(checkpoint.parent)
    assert tokenizer_of(Path("elsewhere")) == checkpoint.parent / "tokenizer.json"


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert find_latest(tmp_path) == (None, [])
    assert find_latest(tmp_path / "nothing") == (None, [])


def test_hidden_files_are_not_ours(root: Path) -> None:
    (root / "step-00000002" / ".nfs0001").touch()
    assert find_latest(root) == (root / "step-00000002", [])


def test_surplus_files_are_ignored_and_said(root: Path) -> None:
    newest = root / "step-00000002"
    shutil.copy(newest / SHARD, newest / "rank-00002-00000.safetensors")
    (newest / "notes.txt").write_text("the good one")
    (newest / "plots").mkdir()
    for found, (warning,) in (find_latest(root), find_named(newest)):
        assert found == newest and same(open_checkpoint(found), NEW)
        assert "also holds notes.txt, plots, rank-00002-00000.safetensors: not of the checkpoint" in warning
    (newest / "z").symlink_to("nowhere")
    assert "rank-00002-00000.safetensors and 1 more" in find_latest(root)[1][0]
    save(root, 3, NEW, dp=2)
    assert find_named(newest)[0] == newest and (newest / "notes.txt").exists()


def test_any_flipped_bit_of_the_manifest_is_seen(root: Path) -> None:
    folder = root / "step-00000002"
    good = (folder / "manifest.json").read_bytes()
    meaning = json.loads(good)
    for position in range(0, len(good), 17):
        text = bytearray(good)
        text[position] ^= 1 << position % 8
        try:
            assert Manifest.from_json(bytes(text)) == Manifest.from_json(good)
            assert json.loads(text) == meaning  # one kind of white space became another
        except CheckpointError:
            continue


def resealed(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest as someone would who can compute its sha256."""
    path = folder / "manifest.json"
    body = json.loads(path.read_bytes())
    change(body)
    del body["sha256"]
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**body, "sha256": digest}))


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "-x", ".x", "a\nb", "é"])
def test_a_file_outside_is_never_opened(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "secret").write_bytes(b"secret")
    folder = root / "step-00000002"

    def change(body: dict[str, Any]) -> None:
        body["files"][name] = body["files"].pop(SHARD)
        for kinds in body["tensors"].values():
            for entry in kinds.values():
                for piece in entry["pieces"]:
                    piece["file"] = name if piece["file"] == SHARD else piece["file"]

    resealed(folder, change)
    opened: list[str] = []
    real = os.open

    def recorded(path: Any, *rest: Any, **options: Any) -> int:
        opened.append(str(path))
        return real(path, *rest, **options)

    monkeypatch.setattr(os, "open", recorded)
    with pytest.raises(CheckpointError, match="a file named"):
        verify(folder)
    assert set(opened) == {str(folder / "manifest.json")}


def test_a_pickle_is_not_executed(root: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(root / "exploded"),)

    folder = root / "step-00000002"
    for name in ("manifest.json", "state.json", SHARD):
        (folder / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(CheckpointError):
            verify(folder)
        with pytest.raises(CheckpointError):
            open_checkpoint(folder)
    assert not (root / "exploded").exists()


def test_a_manifest_that_misdescribes_its_shard(root: Path) -> None:
    folder = root / "step-00000002"

    def change(body: dict[str, Any]) -> None:
        (first, second) = body["tensors"]["blocks.0.down.weight"]["master"]["pieces"]
        first["length"] += 1
        second["offset"] += 1
        second["length"] -= 1
        second["key"] = f"master/blocks.0.down.weight/0:12/{second['offset']}"

    resealed(folder, change)
    reader = open_checkpoint(folder)
    assert torch.equal(reader.read("norm.weight"), NEW["norm.weight", "master"])
    with pytest.raises(CheckpointError, match="expected"):
        reader.read("blocks.0.down.weight")


def test_what_is_not_there_is_refused(root: Path) -> None:
    reader = open_checkpoint(root / "step-00000002")
    with pytest.raises(CheckpointError, match="has no tensor head"):
        reader.read("head")
    with pytest.raises(CheckpointError, match="has no tensor norm"):
        reader.read("norm.weight", "momentum")
    with pytest.raises(CheckpointError, match=r"has shape \(4,\)"):
        reader.read_slice("norm.weight", "master", Slice.full((5,)))


def opened(roots: list[Path]) -> list[Any]:
    """What ranks open, each with its own view of the folder, that is the newest to rank 0; or what they raise."""
    return on_thread_ranks(len(roots), lambda rank: open_agreed(roots[rank]))


def test_all_ranks_open_what_rank_0_finds(root: Path) -> None:
    truncate(root / "step-00000002")
    results = opened([root, root])
    for reader, _ in results:
        assert same(reader, OLD)
        assert reader.state["step"] == 1
    assert [len(warnings) for _, warnings in results] == [1, 0]


def test_no_checkpoint_on_any_rank(tmp_path: Path) -> None:
    assert opened([tmp_path, tmp_path]) == [(None, []), (None, [])]


def test_ranks_with_other_views_all_refuse(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    save(other, 2, OLD, dp=2)
    for roots, words in (
        ([root, other], "rank 1: .* is not the checkpoint that rank 0 sees"),
        ([root, tmp_path / "nothing"], "rank 1: .* cannot be read"),
    ):
        results = opened(roots)
        assert [type(result) for result in results] == [Agreed, Agreed]
        assert len({str(result) for result in results}) == 1
        with pytest.raises(InputError, match=words):
            raise results[0]


def test_a_rank_that_fails_to_open_what_was_agreed_stops_all(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its view of the folder changed after all had checked it."""
    calls: list[int] = []

    def changed(folder: Path, sha256: str | None = None) -> Any:
        calls.append(rank := dist.get_rank())
        if rank and calls.count(rank) == 2:
            raise CheckpointError("it is gone")
        return open_checkpoint(folder, sha256)

    monkeypatch.setattr("llm.checkpoint.reader.open_checkpoint", changed)
    results = opened([root, root])
    assert sorted(calls) == [0, 1, 1]
    assert [str(result) for result in results] == ["rank 1: it is gone"] * 2


def test_a_state_that_is_not_the_manifests_is_refused(root: Path) -> None:
    """As another rank may see it, which has not hashed that file."""
    flip_state_bit(root / "step-00000002")
    with pytest.raises(CheckpointError, match=r"state.json is damaged"):
        open_checkpoint(root / "step-00000002")


def test_damage_everywhere_stops_all_ranks(root: Path) -> None:
    lose_manifest(root / "step-00000001")
    truncate(root / "step-00000002")
    results = opened([root, root])
    assert [type(result) for result in results] == [Agreed, Agreed]
    assert "step-00000001" in str(results[1])
