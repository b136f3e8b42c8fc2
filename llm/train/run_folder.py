"""runs/<name>, the folder of a run's files: one job at a time writes to it, and all nodes must see it."""

from __future__ import annotations

import json
import os
import secrets
import socket
from pathlib import Path

from filelock import FileLock

from llm import files, locks
from llm.errors import InputError, require

# A run that was just killed may have ranks that are still ending.
LOCK_PATIENCE_SECONDS = 5.0


class RunFolder:
    """The folder <root>/<name>, which the config has checked, and its files; nothing is made before `create`."""

    def __init__(self, root: Path, name: str) -> None:
        self.path = root / name
        self.config = self.path / "config.yaml"
        """The config as resolved."""
        self.metrics = self.path / "metrics.jsonl"
        """One JSON line per logged step."""
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"

    def create(self) -> None:
        """Make the folder where there is none; raises InputError where that cannot be."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"the run's folder {self.path} cannot be made: {error}") from error

    def lock(self) -> FileLock:
        """Refuse a second job: called by rank 0, which holds the lock until it releases it or ends, however.

        Raises InputError, saying who holds it, if it is not free within LOCK_PATIENCE_SECONDS.
        """
        advice = "wait for that run to end, stop it, or choose another --name"
        return locks.lock(self.path / "lock", LOCK_PATIENCE_SECONDS, advice)

    def share_nonce(self) -> str:
        """Rank 0: write a new nonce into the folder and return it, to be sent to every rank."""
        nonce = secrets.token_hex(16)
        # In place, not by a rename: opening the same file anew is what NFS keeps consistent.
        descriptor = os.open(self.path / "nonce", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with open(descriptor, "w") as file:
            file.write(nonce)
            file.flush()
            os.fsync(file.fileno())
        return nonce

    def check_nonce(self, nonce: str) -> None:
        """Every rank: raise InputError unless the folder here holds the nonce that rank 0 sent."""
        try:
            found = (self.path / "nonce").read_text()
        except OSError as error:
            found = f"nothing ({error.strerror})"
        require(
            found == nonce,
            f"{socket.gethostname()} does not see what rank 0 wrote into {self.path}: found {found}, expected {nonce}; "
            "put the run's folder on a file system that all nodes share",
        )


def truncate_metrics(path: Path, step: int) -> int:
    """Drop the lines of steps after `step`, and those torn by a crash; returns how many.

    The file is replaced as a whole or not at all. No file is an empty one.
    """
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _is_of_step(line, step)]
    if len(kept) < len(lines):
        files.replace(path, b"".join(kept))
    return len(lines) - len(kept)


def _is_of_step(line: bytes, last: int) -> bool:
    """Whether it is a whole metric line of a step up to `last`."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return False
    return line.endswith(b"\n") and isinstance(step, int) and step <= last
