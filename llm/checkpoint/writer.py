"""Saves a checkpoint: it exists complete and verified, or not at all.

    step-00001000.tmp/    every rank writes and fsyncs its files and a report of them
    manifest.json         rank 0 merges the reports and checks that nothing is missing or there twice
    step-00001000/        rank 0 renames: from here on the checkpoint exists
    latest                rank 0 points to it, then deletes what `keep_last` does not keep

After each of these the ranks tell one another whether they failed, so that all go on or all raise.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llm import files
from llm.checkpoint.manifest import FileEntry, Manifest, Piece, Stored, TensorEntry, merge
from llm.errors import CheckpointError
from llm.parallel.agreement import together

# Pieces are gathered up to this many bytes before they are written: the most that a rank holds.
SHARD_BYTES = 1 << 29
STEP_FOLDER = re.compile(r"step-(\d{8,})(\.old)?")


def write_checkpoint(
    root: Path,
    step: int,
    pieces: Iterable[Piece],
    state: dict[str, Any],
    *,
    keep_last: int,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Save root/step-<step>/ and return its path. Collective over `group` (None: all ranks).

    An existing checkpoint of the step is replaced. The newest `keep_last` checkpoints are kept.

    Args:
        pieces: what this rank writes, each element of the model on exactly one rank; they are taken one by one, and
            taking them must not communicate.
        state: JSON, written as rank 0 gives it.

    Raises:
        CheckpointError: the same on every rank if any of them fails; then the previous checkpoint is as it was and the
            partial folder is gone.
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

    try:
        on_all_ranks(lambda: _prepare(root, partial) if rank == 0 else None)
        on_all_ranks(lambda: _write_rank(partial, step, rank, pieces))
        on_all_ranks(lambda: _seal(partial, world, state) if rank == 0 else None)
        on_all_ranks(lambda: _commit(root, step, keep_last) if rank == 0 else None)
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
    """The complete checkpoints, newest first; one that was being replaced comes after its heir."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if STEP_FOLDER.fullmatch(path.name)]
    return sorted(found, key=lambda path: (step_of(path), path.suffix == ""), reverse=True)


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(path.stem.removeprefix("step-"))


def _prepare(root: Path, partial: Path) -> None:
    """Make the empty folder; what a crash left goes first, so that it does not take room."""
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    _remove_leftovers(root)
    partial.mkdir(mode=0o700)


def _remove_leftovers(root: Path) -> None:
    """Delete half-written and half-deleted folders, and replaced checkpoints whose heir exists."""
    for path in list(root.iterdir()):
        name = path.name
        replaced = name.endswith(".old") and (root / name.removesuffix(".old")).is_dir()
        if name.startswith("step-") and (name.endswith(".tmp") or replaced):
            shutil.rmtree(path)


def _write_rank(partial: Path, step: int, rank: int, pieces: Iterable[Piece]) -> None:
    """Write this rank's pieces in files of about SHARD_BYTES, and its report."""
    prefix = f"rank-{rank:05d}"
    parts = [Manifest(step, {}, {})]
    some = (piece for piece in pieces if len(piece.data))
    for number, shard in enumerate(files.by_size(some, lambda piece: piece.data.nbytes, SHARD_BYTES)):
        parts.append(_write_shard(partial, f"{prefix}-{number:05d}.safetensors", step, shard))
        shard.clear()  # before the next one is gathered
    files.create_bytes(partial / f"{prefix}.json", merge(parts).to_json().encode())


def _write_shard(partial: Path, file: str, step: int, shard: list[Piece]) -> Manifest:
    """Write one safetensors file of the pieces."""
    shapes: dict[str, list[int]] = {}
    parts = []
    for piece in shard:
        part = piece.slice
        key = f"{piece.kind}/{piece.name}/{part.start}:{part.stop}/{piece.start}"
        stored = Stored(file, key, part.dim, part.start, part.stop, offset=piece.start, length=len(piece.data))
        shapes[key] = [stored.length]
        parts.append(Manifest(step, {}, {(piece.name, piece.kind): TensorEntry(part.global_shape, (stored,))}))
    entry = FileEntry(*files.create_safetensors(partial / file, torch.float32, shapes, (p.data for p in shard)))
    return merge([Manifest(step, {file: entry}, {}), *parts])


def _seal(partial: Path, world: int, state: dict[str, Any]) -> None:
    """Merge the ranks' reports into the manifest; then all of the folder is on the disk."""
    reports = [partial / f"rank-{rank:05d}.json" for rank in range(world)]
    merged = merge(Manifest.from_json(files.read_regular(path)) for path in reports)
    merged.check_coverage()
    merged.check_sizes(partial)
    entry = FileEntry(*files.create_bytes(partial / "state.json", json.dumps(state, indent=1).encode()))
    manifest = Manifest(merged.step, {**merged.files, "state.json": entry}, merged.tensors)
    files.create_bytes(partial / "manifest.json", manifest.to_json().encode())
    for path in reports:
        path.unlink()
    files.sync_folder(partial)


def _commit(root: Path, step: int, keep_last: int) -> None:
    """Rename, point to it, and delete what is not kept."""
    final = root / folder_name(step)
    if final.exists():
        # Two renames cannot be one: in between, readers find the replaced one under this name.
        os.rename(final, root / f"{final.name}.old")
    os.rename(root / f"{final.name}.tmp", final)
    files.sync_folder(root)
    files.replace(root / "latest", f"{final.name}\n".encode())
    _remove_leftovers(root)
    # Later steps come from a history that was left: this run could not read them when it resumed.
    later = [path for path in checkpoints(root) if step_of(path) > step]
    earlier = [path for path in checkpoints(root) if step_of(path) < step]
    for path in later + earlier[keep_last - 1 :]:
        # Renamed first: a crash while deleting must not leave a broken checkpoint behind.
        doomed = path.with_name(f"{path.name}.tmp")
        os.rename(path, doomed)
        shutil.rmtree(doomed)
    files.sync_folder(root)
