"""Finds a complete checkpoint, the newest or one that is named, and reads any part of it, whatever layout wrote it."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llm import files
from llm.checkpoint.manifest import LARGEST_MANIFEST, LARGEST_STATE, MANIFEST, FileEntry, Manifest, Stored, TensorEntry
from llm.checkpoint.state import check_state
from llm.checkpoint.writer import STEP_FOLDER, checkpoints, folder_name, step_of
from llm.errors import CheckpointError, InputError, ReadError, require
from llm.parallel.agreement import broadcast, patient_group, together
from llm.slices import Slice

T = TypeVar("T")
HASHING_THREADS = 8


def load_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint whose files are there with the right sizes. Raises CheckpointError, ReadError."""
    if files.patiently(folder.is_symlink, folder):
        raise CheckpointError(f"{folder} is a link and not a folder")
    text = files.read_regular(folder / MANIFEST, LARGEST_MANIFEST)
    try:
        manifest = Manifest.from_json(text)
        manifest.check_coverage()
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    if STEP_FOLDER.fullmatch(folder.name) and manifest.step != step_of(folder):
        raise CheckpointError(f"{folder} holds a checkpoint of step {manifest.step}")
    if "state.json" not in manifest.files:
        raise CheckpointError(f"{folder} has no state.json")
    manifest.check_sizes(folder)
    for path in (folder, folder / MANIFEST, *map(folder.joinpath, manifest.files)):
        if files.patiently(lambda path=path: os.lstat(path), path).st_mode & stat.S_IWOTH:
            advice = "its owner alone should write there: chmod -R o-w"
            raise CheckpointError(f"{path} can be changed by every user of this machine; {advice} {folder}")
    paths = [folder / name for name in manifest.files]
    if files.patiently(lambda: files.mostly_holes(paths), folder):
        size = sum(entry.size for entry in manifest.files.values())
        raise CheckpointError(f"{folder} has {size} bytes, {files.HOLES}: copy it again from its source")
    return manifest


def surplus(folder: Path, manifest: Manifest) -> list[str]:
    """Warnings of what else lies in a checkpoint's folder, and of files of other users. CheckpointError, ReadError."""
    # Hidden files: file systems and desktops leave some. A copied checkpoint may have its tokenizer along.
    ours = {*manifest.files, MANIFEST, "tokenizer.json"}
    extra = sorted(set(files.patiently(lambda: os.listdir(folder), folder)) - ours)
    shown = [name for name in extra if not name.startswith(".")]
    more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
    told = [f"{folder} also holds {', '.join(shown[:3])}{more}: not of the checkpoint, and not read"] if shown else []
    paths = [folder, folder / MANIFEST, *map(folder.joinpath, sorted(manifest.files))]
    owners = {files.patiently(lambda path=path: os.lstat(path), path).st_uid: path for path in reversed(paths)}
    trusted = {0, os.geteuid()} if hasattr(os, "geteuid") else owners
    told += [
        f"{path} belongs to another user (uid {uid}), who can change it"
        for uid, path in owners.items()
        if uid not in trusted
    ]
    return told


def verify(folder: Path, first: int = 0, of: int = 1) -> Manifest:
    """As load_manifest, and every byte of each `of`-th file from the `first` on is as it was written."""
    manifest = load_manifest(folder)
    names = sorted(manifest.files)[first::of]
    with ThreadPoolExecutor(HASHING_THREADS) as pool:  # hashing releases the GIL
        list(pool.map(lambda name: _check_hash(folder / name, manifest.files[name]), names))
    return manifest


def _check_hash(path: Path, entry: FileEntry) -> None:
    """Raise CheckpointError unless the file is a regular one with the hash of its entry; ReadError."""
    files.regular_size(path)
    algorithm, expected = entry.hash
    if files.patiently(lambda: files.hash_of(path, algorithm), path) != expected:
        raise CheckpointError(f"{path} is damaged: its {algorithm} is not that of the manifest")


def find_latest(
    root: Path, among: list[Path] | None = None, check: Callable[[Path], Manifest] = verify
) -> tuple[Path | None, list[str]]:
    """The newest checkpoint under `root` whose every byte is right, and warnings: of newer ones, and of surplus files.

    Folders are scanned: the pointer `latest` is for people and may be stale. None: there is none.
    Raises InputError if there are checkpoints but all of them are damaged, ReadError if one that would be taken cannot
    be read: only what is known to be damaged is passed over. among: those to look at, newest first; check: as `verify`.
    """
    warnings = []
    for folder in checkpoints(root) if among is None else among:
        try:
            return folder, [*warnings, *surplus(folder, check(folder))]
        except ReadError as error:
            advice = f"start again; if it stays so, move {folder} away to resume from the one before"
            raise ReadError(f"{error}: {advice}") from error
        except CheckpointError as error:
            warnings.append(f"checkpoint {folder.name} cannot be used: {error}")
    found = f"no checkpoint in {root} can be used; repair one, or move the folder away to start from nothing"
    require(not warnings, "\n  ".join([found, *warnings]))
    return None, []


def find_named(path: Path, check: Callable[[Path], Manifest] = verify) -> tuple[Path, list[str]]:
    """The checkpoint that `path` names, and warnings: of a run the newest, or the best if it was fine-tuned, or one of
    any name. InputError: not whole.
    """
    require(path.is_dir(), f"{path} is not a folder; expected runs/<name>, or the folder of a checkpoint")
    if (path / "checkpoints").is_dir():
        latest, warnings = find_latest(path / "checkpoints", check=check)
        if latest is None:
            raise InputError(f"{path} holds no complete checkpoint; train first, or choose another run")
        best = open_checkpoint(latest).state.get("best", {}).get("step", step_of(latest))
        if best == step_of(latest):
            return latest, warnings
        told = f"{path} has its lowest validation loss at step {best}"
        if not (folder := latest.with_name(folder_name(best))).is_dir():
            return latest, [*warnings, f"{told}, whose checkpoint is not there: the newest is read"]
        folder, found = find_named(folder, check)
        return folder, [*warnings, *found, f"{told}: that is read"]
    try:
        return path, surplus(path, check(path))
    except CheckpointError as error:
        raise InputError(f"{path} is not a whole checkpoint: {error}") from error


def tokenizer_of(checkpoint: Path) -> Path | None:
    """The tokenizer.json beside a checkpoint: in its folder, else one or two above, where its run has it."""
    near = (folder / "tokenizer.json" for folder in (checkpoint, *checkpoint.absolute().parents[:2]))
    return next((path for path in near if path.is_file()), None)


def own_tokenizer(reader: CheckpointReader) -> Path | None:
    """`tokenizer_of` its folder; InputError where the run was trained with another, CheckpointError, ReadError."""
    path, expected = tokenizer_of(reader.folder), reader.state["data"].get("tokenizer")
    if path is not None and expected is not None:  # what was imported says nothing of it
        found = files.patiently(lambda: files.sha256_of(path), path)
        told = f"{path}: sha256 {found}, the run of {reader.folder} was trained with {expected}"
        require(found == expected, f"{told}: copy that run's tokenizer.json there")
    return path


def open_checkpoint(folder: Path, sha256: str | None = None) -> CheckpointReader:
    """Open a checkpoint that `find_latest`, `find_named` or `verify` found good: tensors are not hashed again.

    sha256: of the manifest that must be found. Raises CheckpointError, ReadError.
    """
    manifest = load_manifest(folder)
    if sha256 not in (None, manifest.sha256):
        raise CheckpointError(f"{folder} is not the checkpoint that rank 0 sees; is the folder shared by all nodes?")
    path = folder / "state.json"
    _check_hash(path, manifest.files["state.json"])
    state = files.read_json(path, LARGEST_STATE)
    try:
        check_state(state, manifest.step)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return CheckpointReader(folder, manifest, state)


def open_agreed(
    root: Path, find: Callable[..., tuple[Path | None, list[str]]] = find_latest
) -> tuple[CheckpointReader | None, list[str]]:
    """Open, on every rank, the checkpoint that `find(root, check=...)` gives rank 0; None: there is none. Collective.

    Every rank hashes its share of the files, and waits for the others however long they take. Rank 0 has the warnings.
    Raises Agreed where `find` raises InputError, or if a rank sees another checkpoint; ReadError where one fails to.
    """
    rank, world = dist.get_rank(), dist.get_world_size()

    def share(name: str, sha256: str) -> Manifest:
        """Verify, all together, the checkpoint that rank 0 has found under `name`."""

        def checked() -> Manifest:
            if rank:
                _on_this_rank(lambda: open_checkpoint(root / name, sha256), InputError)
            return _on_this_rank(lambda: verify(root / name, rank, world), CheckpointError)

        return together(checked, patient)

    def check(folder: Path) -> Manifest:
        asked = str(folder.relative_to(root)), load_manifest(folder).sha256
        broadcast(json.dumps(asked), patient)
        return share(*asked)

    def find_first() -> tuple[str | None, str | None, list[str]]:
        try:
            folder, warnings = find(root, check=check)
            digest = load_manifest(folder).sha256 if folder else None
            return str(folder.relative_to(root)) if folder else None, digest, warnings
        except (CheckpointError, OSError) as error:
            raise InputError(str(error)) from error
        finally:
            broadcast("null", patient)

    def follow() -> tuple[str | None, str | None, list[str]]:
        while (asked := json.loads(broadcast("", patient))) is not None:
            with suppress(Exception):  # rank 0 hears of it, and decides
                share(*asked)
        return None, None, []

    with patient_group() as patient:
        name, sha256, warnings = together(follow if rank else find_first, patient)
        name, sha256 = json.loads(broadcast(json.dumps([name, sha256]), patient))
        if name is None:
            return None, warnings
        opened = together(lambda: _on_this_rank(lambda: open_checkpoint(root / name, sha256), InputError), patient)
        return opened, warnings


def _on_this_rank(action: Callable[[], T], failure: type[Exception]) -> T:
    """What `action` gives; a rank but 0 is named where it fails: with ReadError, or `failure` for a CheckpointError."""
    where = f"rank {dist.get_rank()}: " if dist.get_rank() else ""
    try:
        return action()
    except (CheckpointError, ReadError) as error:
        raise (ReadError if isinstance(error, ReadError) else failure)(f"{where}{error}") from error


class TensorFiles:
    """The safetensors files of a folder, each opened when it is first needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, Any] = {}

    def file(self, name: str) -> Any:
        """What `safe_open` gives; raises CheckpointError, ReadError."""
        path = self._folder / name
        try:
            if name not in self._open:
                self._open[name] = files.patiently(lambda: safe_open(path, framework="pt", device="cpu"), path)
            return self._open[name]
        except SafetensorError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    def tensor(self, file: str, key: str) -> Any:
        """A tensor to be sliced, safetensors' `PySafeSlice`; raises CheckpointError."""
        try:
            return self.file(file).get_slice(key)
        except SafetensorError as error:
            raise CheckpointError(f"{self._folder / file} cannot be read: {error}") from error


class CheckpointReader:
    """An open checkpoint; tensors are read when asked for, and only the parts asked for."""

    def __init__(self, folder: Path, manifest: Manifest, state: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.state = state
        """What write_checkpoint was given as `state`."""
        self._open = TensorFiles(folder)

    def shape(self, name: str, kind: str = "master") -> tuple[int, ...]:
        """Global shape; raises CheckpointError if there is no such tensor."""
        return self._entry(name, kind).shape

    def read(self, name: str, kind: str = "master") -> Tensor:
        """The whole tensor, float32 on the CPU; raises CheckpointError."""
        return self.read_slice(name, kind, Slice.full(self.shape(name, kind)))

    def read_slice(self, name: str, kind: str, part: Slice) -> Tensor:
        """The slice of the tensor, float32 [part.shape] on the CPU; raises CheckpointError."""
        entry = self._entry(name, kind)
        if part.global_shape != entry.shape:
            raise CheckpointError(
                f"{name} ({kind}) has shape {entry.shape} in {self.folder}; the model has {part.global_shape}"
            )
        stored = entry.pieces[0]
        if part.is_full:
            aligned = replace(part, dim=stored.dim, start=0, stop=(entry.shape or (1,))[stored.dim])
        elif part.dim == stored.dim:
            aligned = part
        else:
            # Stored cut along another dimension: no two layouts of a model do that, so be simple.
            return part.take(self.read(name, kind)).clone()
        target = torch.empty(part.shape, dtype=torch.float32)
        for piece in entry.pieces:
            self._copy(entry, piece, aligned, target)
        return target

    def read_range(self, name: str, kind: str, part: Slice, start: int, length: int) -> Tensor:
        """Elements start:start + length of the flattened slice, float32 on the CPU; raises CheckpointError.

        No more than these are read where the slice was saved under the same cut, as it is under the same layout.
        """
        entry = self._entry(name, kind)
        cuts = {piece: Slice(entry.shape, piece.dim, piece.start, piece.stop) for piece in entry.pieces}
        same = [piece for piece, cut in cuts.items() if cut == part or (cut.is_full and part.is_full)]
        if not same or part.global_shape != entry.shape:
            return self.read_slice(name, kind, part).flatten().narrow(0, start, length)
        target = torch.empty(length)
        for piece in same:
            first, last = max(start, piece.offset), min(start + length, piece.offset + piece.length)
            if first < last:
                target[first - start : last - start] = self._flat(piece, first - piece.offset, last - first)
        return target

    def _entry(self, name: str, kind: str) -> TensorEntry:
        if (name, kind) not in self.manifest.tensors:
            raise CheckpointError(f"{self.folder} has no tensor {name} ({kind})")
        return self.manifest.tensors[name, kind]

    def _copy(self, entry: TensorEntry, piece: Stored, part: Slice, target: Tensor) -> None:
        """Copy what the piece holds of `part` into `target`; both are cut along one dimension."""
        inner = prod(entry.shape[piece.dim + 1 :])
        left, right = part.start * inner, part.stop * inner
        grid = target.view(-1, right - left)
        for row, rows, column, columns, offset in _spans(piece, inner):
            start, stop = max(left, column), min(right, column + columns)
            if start >= stop:
                continue
            # One row: read just the columns. More: whole rows, as the columns do not lie together.
            if rows == 1:
                data = self._flat(piece, offset + start - column, stop - start)
            else:
                data = self._flat(piece, offset, rows * columns).view(rows, -1)[:, start - column : stop - column]
            grid[row : row + rows, start - left : stop - left] = data

    def _flat(self, piece: Stored, offset: int, count: int) -> Tensor:
        """`count` elements of the stored range from `offset` on; raises CheckpointError."""
        stored = self._open.tensor(piece.file, piece.key)
        found = (stored.get_dtype(), list(stored.get_shape()))
        if found != ("F32", [piece.length]):
            raise CheckpointError(f"{self.folder / piece.file}: {piece.key} is {found}; expected {piece.length} F32")
        return stored[offset : offset + count]


def _spans(piece: Stored, inner: int) -> Iterator[tuple[int, int, int, int, int]]:
    """The piece as at most three rectangles: the end of a row, whole rows, the start of a row.

    A tensor is seen as [rows, columns]: the product of the dimensions before the one that is cut, and of that one and
    those after it. So a slice is the same columns of every row. Yields (global row, rows, global column, columns,
    offset in the piece). inner: number of elements of the dimensions after the piece's.
    """
    width, left = (piece.stop - piece.start) * inner, piece.start * inner
    position, end = piece.offset, piece.offset + piece.length
    while position < end:
        row, column = divmod(position, width)
        rows = max(1, (end - position) // width) if column == 0 else 1
        columns = min(width - column, end - position)
        yield row, rows, left + column, columns, position - piece.offset
        position += rows * columns
