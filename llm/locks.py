"""Locks of the kernel's on files: whatever ends a process releases its locks."""

from __future__ import annotations

import json
import os
import socket
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout

from llm.errors import CheckpointError, InputError, ReadError
from llm.files import read_json


def lock(path: Path, patience: float = -1, advice: str = "") -> FileLock:
    """Hold the file `path` until release(), or until this process ends, however; the file says who holds it, in JSON.

    patience: seconds to wait for another holder, below 0 as long as it takes. Raises InputError, saying who holds it
    and what to do (`advice`), when they have passed, and where the file system has no locks.
    """

    def sign(descriptor: int) -> None:
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        record = {"host": socket.gethostname(), "pid": os.getpid(), "started": started}
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(record).encode(), 0)

    # Not the library's soft locks, where the kernel has none: who is killed would hold one for ever.
    held = FileLock(path, patience, fallback_to_soft=False, on_acquired=sign)
    try:
        held.acquire()
    except Timeout as error:
        raise InputError(f"{path.parent} is in use by {_holder(path)}; {advice}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be locked: {error}") from error
    return held


def _holder(path: Path) -> str:
    """What the holder of a lock wrote of itself, in words."""
    try:
        found = read_json(path)
        return f"process {found['pid']} on {found['host']} since {found['started']}"
    except (CheckpointError, ReadError, KeyError):
        return "a process that has not yet said who it is"
