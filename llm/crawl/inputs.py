"""The files of the raw input, on disk or at a URL, each a task."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import xxhash
from fsspec.implementations.local import LocalFileSystem

from llm.crawl.settings import InputConfig
from llm.crawl.tasks import Task, hash_of
from llm.errors import InputError, require

SAMPLE = 64 << 10  # bytes at the beginning, the middle and the end of a file that it is known by, beside name and size


def input_tasks(config: InputConfig, folder: Path) -> list[Task]:
    """A task for each file, in the order of their names. Raises InputError where there is none.

    input.limit is shared out evenly among the first files.
    """
    require(bool(config.source), "input.source is not set; give a file, a folder, a glob or a URL")
    try:
        system, path = fsspec.core.url_to_fs(config.source)
        root, found = _listed(system, path)
        inside = isinstance(system, LocalFileSystem) and folder.resolve().is_relative_to(Path(root).resolve())
        if inside and (system.isdir(path) or "**" in path):
            raise InputError(f"out {folder.parent} lies in input.source {config.source}: choose another out")
        named = ((name[len(root) :].lstrip("/"), name) for name in sorted(found))
        seen = [pair for pair in named if not any(part.startswith(".") for part in pair[0].split("/"))]
        limit = config.limit
        files = min(limit or len(seen), len(seen))
        tasks = [
            _task(system, name, Task(i, (), folder, _text(source), limit and limit // files + (i < limit % files)))
            for i, (source, name) in enumerate(seen[:files])
        ]
    # OSError: a file or bucket cannot be read; the others: the protocol's package is missing, or there is none.
    except (OSError, ImportError, ValueError) as error:
        raise InputError(f"input.source {config.source} cannot be opened: {error}") from error
    require(bool(tasks), f"input.source {config.source}: found no file; expected a file, a folder, a glob or a URL")
    return tasks


def _text(source: str) -> str:
    """The name as text that can be written: of a file's name, any bytes, those that are not UTF-8 are spelled."""
    return source.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _listed(system: Any, path: str) -> tuple[str, list[str]]:
    """The folder that names are relative to, and the names of the files."""
    if any(sign in path for sign in "*?["):
        root = path[: min(path.find(sign) % (len(path) + 1) for sign in "*?[")].rpartition("/")[0]
        return root, [name for name in system.glob(path) if not system.isdir(name)]
    if system.isdir(path):
        return path.rstrip("/"), system.find(path)
    return path.rpartition("/")[0], [path] if system.exists(path) else []


def _task(system: Any, name: str, task: Task) -> Task:
    """The task with what its file is known by."""
    if isinstance(system, LocalFileSystem):
        size, tag = Path(name).stat().st_size, _sampled(Path(name))
        task = replace(task, inputs=(Path(name),))
    else:
        about = system.info(name)
        size, tag = about["size"], about.get("ETag")
        task = replace(task, url=system.unstrip_protocol(name))
    return replace(task, size=size or 0, identity=hash_of([task.source, size, tag, task.limit]))


def _sampled(path: Path) -> str:
    digest = xxhash.xxh128()
    with path.open("rb") as file:
        size = file.seek(0, 2)
        for start in (0, size // 2, max(0, size - SAMPLE)):
            file.seek(start)
            digest.update(file.read(SAMPLE))
    return digest.hexdigest()
