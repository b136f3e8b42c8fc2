"""Saves a checkpoint: it exists complete and verified, or not at all.

    step-00001000.tmp/    every rank writes and fsyncs its files and a report of them
    manifest.json         rank 0 merges the reports and checks that nothing is missing or there twice
    step-00001000/        rank 0 renames: from here on the checkpoint exists
    latest                rank 0 points to it, then deletes what `keep_last` and `keep_every` do not keep
    step-00002000.aside-1 what the run left when it went back: kept, and never read

After each of these the ranks tell one another whether they failed, so that all go on or all raise.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import count
from math import inf
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from llm import files
from llm.checkpoint import manifest as tables
from llm.checkpoint.manifest import FileEntry, Manifest, Piece, Stored, TensorEntry, key_of, merge
from llm.errors import CheckpointError
from llm.parallel.agreement import exchange, together

Each: TypeAlias = Callable[[Iterable[Any]], Iterable[Any]]
# Pieces are gathered up to this many bytes before they are written: the most that a rank holds.
SHARD_BYTES = 1 << 29
STEP_FOLDER = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,17})(\.old)?")


def write_checkpoint(
    root: Path,
    step: int,
    pieces: Iterable[Piece],
    state: dict[str, Any],
    *,
    keep_last: int,
    keep_every: int | None = None,
    size: int = 0,
    say: Callable[[str], None] = lambda text: None,
    copying: Callable[[], Path | None] = lambda: None,
    each: Each = iter,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Save root/step-<step>/ and return its path. Collective over `group` (None: all ranks).

    The newest `keep_last` checkpoints are kept, those whose step is a multiple of `keep_every`, and the one that
    `state` calls best. One of this step or a later one, which the run has left, is put aside.

    Args:
        pieces: what this rank writes, each element of the model on exactly one rank; taking one must not communicate.
        state: JSON, written as rank 0 gives it.
        size: bytes of this rank's pieces, if known: nothing is written where there is no room for those of all ranks.
        say: told by rank 0 what was put aside, and what could not be.
        copying: the checkpoint that is being copied elsewhere, which is left for a later save to delete.
        each: yields the pieces, and the files that are looked at or deleted, one by one as they are dealt with.

    Raises:
        CheckpointError: on every rank if any fails, or has a value that is not finite; no checkpoint was touched then.
    """
    partial = root / f"{folder_name(step)}.tmp"
    rank, world = dist.get_rank(group), dist.get_world_size(group)

    def on_all_ranks(action: Callable[[], None]) -> None:
        def attempt() -> None:
            try:
                action()
            except CheckpointError:
                raise
            except Exception as error:
                raise CheckpointError(f"saving failed: {type(error).__name__}: {error}") from error

        together(attempt, group)

    def doomed(earlier: list[str]) -> list[str]:
        kept = copying(), root / folder_name(state.get("best", {}).get("step", step))
        return [name for name in outdated(earlier, keep_last, keep_every) if root / name not in kept]

    needed = sum(int(text or 0) for text in exchange(str(size), group))
    try:
        on_all_ranks(lambda: _prepare(root, step, needed, say, each) if rank == 0 else None)
        on_all_ranks(lambda: _write_rank(partial, step, rank, each(pieces)))
        on_all_ranks(lambda: _seal(partial, world, state, each) if rank == 0 else None)
        on_all_ranks(lambda: _commit(root, step, doomed, say, each) if rank == 0 else None)
    except CheckpointError:
        # No rank writes any more: the ranks met after everybody's work.
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return root / folder_name(step)


def folder_name(step: int) -> str:
    """step-00001000"""
    return f"step-{step:08d}"


def checkpoints(root: Path) -> list[Path]:
    """What is named as a complete checkpoint and is no file, newest first; one being replaced comes after its heir."""
    # Not isdir, which is false for a folder that cannot be reached just now.
    found = [path for path in _entries(root) if STEP_FOLDER.fullmatch(path.name) and not os.path.isfile(path)]
    return sorted(found, key=lambda path: (step_of(path), path.suffix == ""), reverse=True)


def last_good(root: Path, step: int) -> str:
    """What a run that stops at `step` says of where it can go on: only what is finite was saved."""
    newest = next((path for path in checkpoints(root) if step_of(path) < step and _is_checkpoint(path)), None)
    return f"the last good checkpoint is {newest}" if newest else f"there is no checkpoint from before in {root}"


def outdated(earlier: list[str], keep_last: int, keep_every: int | None) -> list[str]:
    """Which of the checkpoints before the one just saved, by name and newest first, are not kept."""
    return [name for name in earlier[keep_last - 1 :] if keep_every is None or step_of(Path(name)) % keep_every]


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(path.stem.removeprefix("step-"))


def _entries(root: Path) -> list[Path]:
    """All that lies in `root`, nothing where there is no such folder. Raises CheckpointError, ReadError."""

    def listed() -> list[Path]:
        with suppress(FileNotFoundError, NotADirectoryError):
            return list(root.iterdir())
        return []

    return files.patiently(listed, root)


def _is_checkpoint(path: Path) -> bool:
    """Whether `path` is a folder with a manifest; what cannot be reached is none."""
    return os.path.isfile(path / tables.MANIFEST) and not os.path.islink(path)


def _prepare(root: Path, step: int, needed: int, say: Callable[[str], None], each: Each) -> None:
    """Make the empty folder; what a crash left goes first, so that it does not take room, and so do strangers."""
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    _remove_leftovers(root, say, each)
    final = root / folder_name(step)
    files.check_room(final, needed)  # beside all that is kept until the new one is whole
    partial, old = (final.with_name(final.name + end) for end in (".tmp", ".old"))
    pointers = (path for path in (root / "latest", root / "latest.tmp") if os.path.isdir(path))
    for path in (partial, old if _is_checkpoint(final) else final, *pointers):
        if os.path.lexists(path):
            put_aside(path, "it was where a checkpoint is to be written", say)
    partial.mkdir(mode=0o700)


def _remove_leftovers(root: Path, say: Callable[[str], None], each: Each) -> None:
    """Delete half-written and half-deleted folders, and put replaced checkpoints aside whose heir exists."""
    for path in _entries(root):
        name = path.name
        if name.endswith(".tmp") and STEP_FOLDER.fullmatch(name.removesuffix(".tmp")) and os.path.isdir(path):
            _remove(path, each, ignore_errors=True)
        elif name.endswith(".old") and STEP_FOLDER.fullmatch(name) and _is_checkpoint(path.with_suffix("")):
            put_aside(path, f"step {step_of(path)} was saved again", say)


def put_aside(path: Path, why: str, say: Callable[[str], None]) -> None:
    """Give `path` a name that no one reads, or say that it cannot be done."""
    name = path.name.removesuffix(".old")
    target = next(free for n in count(1) if not os.path.lexists(free := path.with_name(f"{name}.aside-{n}")))
    try:
        os.rename(path, target)
    except OSError as error:
        say(f"warning: {path} cannot be put aside: {error.strerror}")
    else:
        say(f"{path} is kept as {target.name} ({why}): delete it when you do not need it")


def _remove(folder: Path, each: Each, *, ignore_errors: bool = False) -> None:
    """Delete a folder, file by file; links are not followed. Raises OSError where something stays."""
    with suppress(OSError):
        for _, _, names, descriptor in os.fwalk(folder):
            for name in each(names):
                os.unlink(name, dir_fd=descriptor)
    shutil.rmtree(folder, ignore_errors=ignore_errors)


def _delete(path: Path, say: Callable[[str], None], each: Each) -> None:
    """Delete a checkpoint, or say that it cannot be done."""
    # Renamed first: a crash while deleting must not leave a broken checkpoint behind.
    doomed = path.with_name(f"{path.name}.tmp")
    try:
        os.rename(path, doomed)
        _remove(doomed, each)
    except OSError as error:
        say(f"warning: {path} cannot be deleted: {error}")


def _write_rank(partial: Path, step: int, rank: int, pieces: Iterable[Piece]) -> None:
    """Write this rank's pieces in files of about SHARD_BYTES, and its report."""
    prefix = f"rank-{rank:05d}"
    parts = [Manifest(step, {}, {})]
    some = (piece for piece in pieces if len(piece.data))
    for number, shard in enumerate(files.by_size(some, lambda piece: piece.data.nbytes, SHARD_BYTES)):
        # Each is looked at right before it is hashed and written: while it is in the processor's cache.
        finite = (_finite(piece, partial.parent, step, rank) for piece in shard)
        parts.append(_write_shard(partial, f"{prefix}-{number:05d}.safetensors", step, shard, finite))
        shard.clear()  # before the next one is gathered
    files.create_bytes(partial / f"{prefix}.json", merge(parts).to_json().encode())


def _finite(piece: Piece, root: Path, step: int, rank: int) -> Tensor:
    """The piece's data on the CPU; CheckpointError if a value of it is not finite."""
    data = piece.data.cpu()
    low, high = map(float, data.aminmax())  # both NaN if any value is
    if not -inf < low <= high < inf:
        raise CheckpointError(
            f"step {step} is not saved: rank {rank} has values of {piece.name} ({piece.kind}) that are not finite; "
            f"{last_good(root, step)}: start again, with a lower optim.lr or optim.grad_clip if it comes back; "
            "if always on one rank, suspect its GPU or memory"
        )
    return data


def _write_shard(partial: Path, file: str, step: int, shard: list[Piece], tensors: Iterator[Tensor]) -> Manifest:
    """Write one safetensors file of the pieces, whose data are `tensors`."""
    shapes: dict[str, list[int]] = {}
    parts = []
    for piece in shard:
        part = piece.slice
        key = key_of(piece.kind, piece.name, part.start, part.stop, piece.start)
        stored = Stored(file, key, part.dim, part.start, part.stop, offset=piece.start, length=len(piece.data))
        shapes[key] = [stored.length]
        parts.append(Manifest(step, {}, {(piece.name, piece.kind): TensorEntry(part.global_shape, (stored,))}))
    entry = FileEntry(*files.create_safetensors(partial / file, torch.float32, shapes, tensors))
    return merge([Manifest(step, {file: entry}, {}), *parts])


def _seal(partial: Path, world: int, state: dict[str, Any], each: Each) -> None:
    """Merge the ranks' reports into the manifest; then all of the folder is on the disk."""
    reports = [partial / f"rank-{rank:05d}.json" for rank in range(world)]
    merged = merge(Manifest.from_json(files.read_regular(path, tables.LARGEST_MANIFEST)) for path in each(reports))
    merged.check_coverage()
    merged.check_sizes(partial, each)
    known = json.dumps(state, indent=1, allow_nan=False).encode()
    entry = FileEntry(*files.create_bytes(partial / "state.json", known))
    manifest = Manifest(merged.step, {**merged.files, "state.json": entry}, merged.tensors)
    text = manifest.to_json().encode()
    Manifest.from_json(text)  # what is saved can be read
    files.create_bytes(partial / tables.MANIFEST, text)
    for path in each(reports):
        path.unlink()
    files.sync_folder(partial)


def _commit(
    root: Path, step: int, doomed: Callable[[list[str]], list[str]], say: Callable[[str], None], each: Each
) -> None:
    """Rename, point to it, put aside what comes after it, and delete what is not kept of those before it."""
    final = root / folder_name(step)
    if final.exists():
        # Two renames cannot be one: in between, readers find the replaced one under this name.
        os.rename(final, root / f"{final.name}.old")
    os.rename(root / f"{final.name}.tmp", final)
    files.sync_folder(root)
    files.replace(root / "latest", f"{final.name}\n".encode())
    _remove_leftovers(root, say, each)
    found = checkpoints(root)
    for path in found:
        if step_of(path) > step:  # from a history that was left: a run that resumed would go back to it
            put_aside(path, f"the run went back, and has saved step {step} since", say)
    earlier = [path for path in found if step_of(path) < step and _is_checkpoint(path)]
    for name in doomed([path.name for path in earlier]):
        _delete(root / name, say, each)
    files.sync_folder(root)
