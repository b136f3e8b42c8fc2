"""Writes files completely or not at all: private, fsynced, never through a symlink. Also computes their hashes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from llm.errors import CheckpointError, InputError, require

# Writes and reads go through hashing in parts of this size, in bytes.
CHUNK = 1 << 22


def create(path: Path, parts: Iterable[bytes | memoryview], size: int) -> str:
    """Write a new file of `size` bytes, mode 0600, fsync it and return its sha256 in hex.

    Raises CheckpointError, naming the bytes needed and free, where the disk or the quota is full,
    and FileExistsError where there is such a file.
    """
    digest = hashlib.sha256()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with open(descriptor, "wb", buffering=0) as file:
            for part in parts:
                view = memoryview(part).cast("B")
                for start in range(0, len(view), CHUNK):
                    write_all(file.fileno(), view[start : start + CHUNK])
                    digest.update(view[start : start + CHUNK])
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CheckpointError(
            f"the disk is full: {path} needs {size} bytes and {room_for(path)} are free; "
            "make room or save elsewhere, then start the run again"
        ) from error
    return digest.hexdigest()


def write_all(descriptor: int, view: memoryview) -> None:
    """os.write until all of `view` is written: one call may take less."""
    while len(view):
        view = view[os.write(descriptor, view) :]


def room_for(path: Path) -> int:
    """Bytes that the file may take: those free and those that it has."""
    status = os.statvfs(path.parent)
    allocated = os.lstat(path).st_blocks * 512 if path.exists() else 0
    return status.f_bavail * status.f_frsize + allocated


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(path: Path, content: bytes) -> None:
    """Make `path` hold `content`, or, whatever happens, leave it as it was."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    create(temporary, [content], len(content))
    os.replace(temporary, path)
    sync_folder(path.parent)


@contextmanager
def complete_file(path: Path) -> Iterator[BinaryIO]:
    """A new file to write, which takes the place of `path`, fsynced, when the block ends without an exception."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def regular_size(path: Path) -> int:
    """Size in bytes of a regular file; CheckpointError for anything else, a symlink included."""
    try:
        status = os.lstat(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is not a regular file")
    return status.st_size


def read_regular(path: Path) -> bytes:
    """The bytes of a regular file; raises CheckpointError."""
    regular_size(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        with open(descriptor, "rb") as file:
            return file.read()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def parse_json(text: bytes, what: str) -> dict[str, Any]:
    """The JSON object in `text`; raises CheckpointError, naming `what`, on anything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{what} is not a JSON object")
    return found


def sha256_of(path: Path | str, progress: Callable[[int], None] = lambda count: None) -> str:
    """SHA-256 of a file in hex; `progress` is called with the bytes read since its last call. Raises OSError."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            progress(count)
    return digest.hexdigest()


def claim(path: Path) -> None:
    """Make the folder that a report, option --json, will lie in; InputError if it cannot be written there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--json {path}: the folder cannot be made ({error}); choose another path") from error
    writable = os.access(path.parent, os.W_OK) and not path.is_dir()
    require(writable, f"--json {path} is a folder or lies in one that cannot be written; choose another path")
