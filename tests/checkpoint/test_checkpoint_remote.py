"""The second copy of a run's checkpoints: whole or none, kept as here, and believed in nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest
from checkpoint_helpers import make_tensors, same, save
from fsspec.callbacks import Callback
from states import state_of

from llm.checkpoint import remote
from llm.checkpoint.manifest import FileEntry, Manifest
from llm.checkpoint.reader import find_latest, load_manifest, open_checkpoint
from llm.checkpoint.remote import Mirror, Remote, find_or_fetch
from llm.errors import CheckpointError, InputError, ReadError
from llm.train.resume import find_step

ROOT = Path(__file__).resolve().parents[2]
OLD, NEW = make_tensors(1), make_tensors(2)
KEEP = {"keep_last": 2, "keep_every": None}
NAMES = [f"step-{step:08}" for step in range(6)]


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Iterator[Remote]:
    monkeypatch.setattr(remote, "WAITS", (0.0, 0.0))
    store = fsspec.filesystem("memory")
    store.store.clear()
    store.pseudo_dirs[:] = [""]
    yield Remote("memory://bucket/runs", "a")
    store.store.clear()


def there(copies: Remote) -> set[str]:
    """Folders at the remote."""
    return {path.rpartition("/")[2] for path in copies.system.ls(copies.root, detail=False)}


def put(copies: Remote, root: Path, *steps: int, **keep: Any) -> None:
    for step in steps:
        save(root, step, OLD if step % 2 else NEW, dp=2, keep_last=9)
        copies.put(root / NAMES[step], **KEEP | keep)


def found(copies: Remote, root: Path, step: int | None = None) -> tuple[Path | None, list[str]]:
    return find_or_fetch(root, copies, partial(find_step, step=step), step, lambda text: None)


def test_a_copy_is_fetched_where_there_is_nothing_newer(copies: Remote, tmp_path: Path) -> None:
    put(copies, tmp_path / "here", 1, 2)
    folder, warnings = found(copies, tmp_path / "there")
    assert (folder, warnings) == (tmp_path / "there" / NAMES[2], [])
    assert same(open_checkpoint(folder), NEW)
    save(tmp_path / "there", 3, OLD)
    assert found(copies, tmp_path / "there")[0] == tmp_path / "there" / NAMES[3]
    assert found(Remote("memory://bucket/runs", "other"), tmp_path / "none") == (None, [])


@pytest.mark.parametrize("all_are", [True, False])
def test_a_damaged_checkpoint_is_replaced_by_its_copy(all_are: bool, copies: Remote, tmp_path: Path) -> None:
    put(copies, tmp_path, 1, 2)
    for step in (1, 2) if all_are else (2,):
        (tmp_path / NAMES[step] / "state.json").unlink()
    folder, warnings = found(copies, tmp_path)
    assert folder == tmp_path / NAMES[2] and same(open_checkpoint(folder), NEW)
    assert (tmp_path / f"{NAMES[2]}.aside-1").exists()
    assert len(warnings) == (0 if all_are else 1)  # of the damage; where there was nothing else, it was mended


def test_a_step_that_is_asked_for_is_fetched(copies: Remote, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path / "here", step, OLD if step % 2 else NEW, keep_last=9, state=state_of(step))
        copies.put(tmp_path / "here" / NAMES[step], keep_last=9, keep_every=None)
    folder, _ = found(copies, tmp_path / "there", 1)
    assert folder == tmp_path / "there" / NAMES[1]
    save(tmp_path / "other", 1, OLD)  # no `resume_step`, so it is asked of a folder without later ones
    with pytest.raises(InputError, match="resume_step is 5"):
        found(Remote("memory://bucket/runs", "none"), tmp_path / "other", 5)


def test_copies_are_kept_as_the_checkpoints_are(copies: Remote, tmp_path: Path) -> None:
    put(copies, tmp_path, 1, 2, 3, 4, keep_last=1, keep_every=2)
    assert there(copies) == {NAMES[2], NAMES[4]}
    save(tmp_path / "again", 2, OLD, dp=2)
    copies.put(tmp_path / "again" / NAMES[2], **KEEP)  # the run went back, and saved step 2 again
    copies.put(tmp_path / "again" / NAMES[2], **KEEP)
    assert there(copies) == {NAMES[2], f"{NAMES[2]}.aside-1", f"{NAMES[4]}.aside-1"}
    folder, _ = found(copies, tmp_path / "there")
    assert folder is not None and same(open_checkpoint(folder), OLD)


def test_a_copy_without_its_manifest_is_none(copies: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(copies, tmp_path, 1)
    save(tmp_path, 2, NEW, dp=2)

    def dies(path: str, text: bytes) -> None:
        raise ConnectionError("no route")

    with monkeypatch.context() as patch:
        patch.setattr(copies.system, "pipe_file", dies)
        with pytest.raises(ReadError, match="memory://bucket/runs/a: dies failed: ConnectionError: no route"):
            copies.put(tmp_path / NAMES[2], **KEEP)
    assert there(copies) == {NAMES[1], NAMES[2]} and copies.names() == [NAMES[1]]
    assert found(copies, tmp_path / "there")[0] == tmp_path / "there" / NAMES[1]
    put(copies, tmp_path, 3)
    assert there(copies) == {NAMES[1], NAMES[3]}


def test_the_manifest_is_written_last_and_deleted_first(
    copies: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def recorded(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            target = str(arguments[1] if name == "put_file" else arguments[0])
            done.append(f"{name} {target[len(copies.root) + 1 :]}")
            return call(*arguments, **options)

        return wrapper

    for name in ("put_file", "pipe_file", "rm", "rm_file"):
        monkeypatch.setattr(copies.system, name, recorded(name, getattr(copies.system, name)))
    put(copies, tmp_path, 1, 2, keep_last=1)
    manifests = [line for line in done if line.endswith("manifest.json") or line.startswith("rm ")]
    assert manifests[:2] == [f"pipe_file {NAMES[1]}/manifest.json", f"pipe_file {NAMES[2]}/manifest.json"]
    assert manifests[2:4] == [f"rm_file {NAMES[1]}/manifest.json", f"rm {NAMES[1]}"]
    assert done.index(manifests[1]) > max(i for i, line in enumerate(done) if line.startswith(f"put_file {NAMES[2]}/"))


def forge(copies: Remote, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest of a copy, sha256 and all."""
    path = f"{copies.root}/{name}/manifest.json"
    body = json.loads(copies.system.cat_file(path))
    change(body)
    body.pop("sha256")
    from llm.checkpoint import manifest

    copies.system.pipe_file(path, json.dumps({**body, "sha256": manifest._digest(body)}).encode())


def escape(body: dict[str, Any]) -> None:
    body["files"]["../../evil"] = body["files"].pop("state.json")


def flip(body: dict[str, Any]) -> None:
    body["files"]["state.json"]["xxh128"] = 32 * "0"


def grow(body: dict[str, Any]) -> None:
    shard, piece = "rank-00000-00000.safetensors", {"dim": 0, "start": 0, "stop": 2**57, "offset": 0, "length": 2**57}
    piece = piece | {"file": shard, "key": f"master/large/0:{2**57}/0"}
    body["tensors"]["large"] = {"master": {"shape": [2**57], "pieces": [piece]}}
    body["files"][shard]["size"] += 4 * 2**57


def other_step(body: dict[str, Any]) -> None:
    body["step"] = 7


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (escape, "has a file named '../../evil'"),
        (flip, "state.json is damaged"),
        (grow, "the disk is full"),
        (other_step, "is of step 7"),
    ],
)
def test_a_copy_that_is_not_as_it_says_is_passed_over(
    change: Callable[[dict[str, Any]], None], words: str, copies: Remote, tmp_path: Path
) -> None:
    put(copies, tmp_path / "here", 1, 2)
    forge(copies, NAMES[2], change)
    folder, (warning,) = found(copies, tmp_path / "there")
    assert folder == tmp_path / "there" / NAMES[1] and same(open_checkpoint(folder), OLD)
    assert words in warning and f"memory://bucket/runs/a/{NAMES[2]}" in warning
    assert {path.name for path in tmp_path.iterdir()} == {"here", "there"}
    assert NAMES[2] not in {path.name for path in (tmp_path / "there").iterdir()}
    copies.system.rm(f"{copies.root}/{NAMES[1]}", recursive=True)
    with pytest.raises(InputError, match="no checkpoint at memory://bucket/runs/a can be used") as refused:
        found(copies, tmp_path / "nothing here")  # to begin anew would put the copy aside
    assert words in str(refused.value)
    (tmp_path / "damaged" / NAMES[3]).mkdir(parents=True)
    with pytest.raises(InputError, match="(?s)can be used; repair one.*" + words):
        found(copies, tmp_path / "damaged")


def test_a_checkpoint_is_not_deleted_while_it_is_copied(
    copies: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a run that saves faster than it copies would never have a copy."""
    said: list[str] = []
    put_file, mirror = copies.system.put_file, Mirror(copies, **KEEP, say=said.append)

    def saves_before(*arguments: Any, **options: Any) -> None:
        if not (tmp_path / NAMES[3]).exists():
            for step in (2, 3):
                save(tmp_path, step, NEW, keep_last=1, copying=lambda: mirror.copying)
        put_file(*arguments, **options)

    monkeypatch.setattr(copies.system, "put_file", saves_before)
    monkeypatch.setattr(remote, "STREAMS", 1)
    save(tmp_path, 1, OLD, keep_last=1)
    mirror.begin(tmp_path / NAMES[1])
    mirror.close()
    assert said == [f"{NAMES[1]} is copied to memory://bucket/runs/a"]
    save(tmp_path, 4, NEW, keep_last=1, copying=lambda: mirror.copying)
    assert {path.name for path in tmp_path.iterdir()} == {NAMES[4], "latest"}


def test_names_of_the_remote_are_checked(copies: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(copies, tmp_path, 1)
    strange = ["a/..", "a/../step-00000009", "a/step-1", "a/step-00000002.old", "a/step-00000003.aside-1", "a/-rf"]
    listed = copies.system.ls(copies.root, detail=False)
    monkeypatch.setattr(copies.system, "ls", lambda *arguments, **options: [*listed, *strange])
    assert copies._folders() == ["step-00000009", NAMES[1]]  # the last part alone, below the run's own folder
    assert copies.names() == [NAMES[1]]


def test_a_copy_that_fails_is_tried_again_then_warned_about(
    copies: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    fast, fails = copies.system.put_file, 0

    def put_file(*arguments: Any, **options: Any) -> None:
        nonlocal fails
        fails += 1
        if fails in (1, *range(3, 99)):
            raise ConnectionError("no route")
        fast(*arguments, **options)

    monkeypatch.setattr(copies.system, "put_file", put_file)
    monkeypatch.setattr(remote, "STREAMS", 1)
    one, two = NAMES[1], NAMES[2]
    save(tmp_path, 1, OLD)
    mirror = Mirror(copies, **KEEP, say=said.append)
    mirror.begin(tmp_path / one)
    mirror.close()
    assert len(said) == 1 and said[0].startswith(f"warning: {tmp_path / one} is not copied: ") and "no route" in said[0]
    fails = 99
    save(tmp_path, 2, NEW)
    mirror = Mirror(copies, **KEEP, say=said.append)
    mirror.begin(tmp_path / two)
    mirror.close()
    assert said[1:] == [f"{two} is copied to memory://bucket/runs/a"]
    assert there(copies) == {two}


def test_a_remote_that_cannot_be_read(copies: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here: the run must not begin anew. Something here: it goes on."""

    def ls(*arguments: Any, **options: Any) -> None:
        raise PermissionError("no credentials")

    put(copies, tmp_path / "here", 2)
    for request in ("info", "ls"):
        monkeypatch.setattr(copies.system, request, ls)
        with pytest.raises(ReadError, match="no credentials"):
            found(copies, tmp_path)
    save(tmp_path, 1, OLD)
    folder, (warning,) = found(copies, tmp_path)
    assert folder == tmp_path / NAMES[1] and "no credentials; the run goes on from what is here" in warning
    with pytest.raises(InputError, match=r"checkpoint.copy_to nothing://x cannot be opened"):
        Remote("nothing://x", "a")


def test_what_is_fetched_is_as_durable_as_what_is_saved(copies: Remote, tmp_path: Path) -> None:
    put(copies, tmp_path / "here", 1)
    copies.get(NAMES[1], tmp_path / "there", lambda text: None)
    here, there = (load_manifest(tmp_path / name / NAMES[1]) for name in ("here", "there"))
    assert here == there and isinstance(here, Manifest)
    assert {entry.stat().st_mode & 0o777 for entry in (tmp_path / "there" / NAMES[1]).iterdir()} == {0o600}
    with pytest.raises(CheckpointError, match="is not there"):
        copies.get(NAMES[2], tmp_path / "there", lambda text: None)
    assert find_latest(tmp_path / "there") == (tmp_path / "there" / NAMES[1], [])
    assert all(isinstance(entry, FileEntry) for entry in here.files.values())


# A copy to a store of which no request returns, in a process of its own: it must end.
HANGING = """
import sys, threading
from pathlib import Path
from llm.checkpoint import remote
remote.POLL_SECONDS = 0.1
copies = remote.Remote("memory://bucket", "a")
copies.system.put_file = lambda *arguments, **options: threading.Event().wait()
mirror = remote.Mirror(copies, patience=0.5, keep_last=2, keep_every=None, say=print)
mirror.begin(Path(sys.argv[1]))
mirror.close()
"""


def test_a_copy_that_hangs_keeps_no_process(tmp_path: Path) -> None:
    save(tmp_path, 1, OLD)
    command = [sys.executable, "-c", HANGING, str(tmp_path / NAMES[1])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    (said,) = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert said.startswith(f"warning: {tmp_path / NAMES[1]} is not copied: memory://bucket/a has not answered for ")


def slow_copy(system: Any, piece_seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of three pieces, which take so long each."""
    fast = system.put_file

    def put_file(here: str, there: str, callback: Callback) -> None:
        for _ in range(3):
            time.sleep(piece_seconds)
            callback.relative_update(1)
        fast(here, there)

    monkeypatch.setattr(system, "put_file", put_file)


def test_a_copy_of_which_pieces_come_is_waited_for(
    copies: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though a file takes longer than its patience."""
    said: list[str] = []
    slow_copy(copies.system, 1.5, monkeypatch)
    monkeypatch.setattr(remote, "POLL_SECONDS", 0.1)
    save(tmp_path, 1, OLD)
    mirror = Mirror(copies, **KEEP, patience=4, say=said.append)
    mirror.begin(tmp_path / NAMES[1])
    mirror.close()
    assert said == [f"{NAMES[1]} is copied to memory://bucket/runs/a"]


def test_a_local_folder_tells_of_every_piece(tmp_path: Path) -> None:
    copies = Remote(f"file://{tmp_path}/copies", "a")
    copies.system.makedirs(copies.root)
    copies.system.blocksize, calls = 10, []  # of the instance
    copies.answered.call = lambda *hook, **options: calls.append(hook)  # pyright: ignore[reportAttributeAccessIssue]
    (tmp_path / "file").write_bytes(bytes(95))
    copies.put_file(str(tmp_path / "file"), f"{copies.root}/file")
    assert len(calls) > 9 and (tmp_path / "copies/a/file").read_bytes() == bytes(95)
