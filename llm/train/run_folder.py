"""runs/<name>, the folder of a run's files: one job at a time writes to it, and all nodes must see it."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from llm import files, locks
from llm.errors import InputError, Stopped, require

RUNS = Path("runs")
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
        self.tokenizer = self.path / "tokenizer.json"
        self.kernels = self.path / "kernels.json"
        """What train.impl=auto has measured (llm/train/choice.py)."""
        self.profile = self.path / "profile"
        """Asks the running job for a profile; its content is the number of steps (llm/train/profiling.py)."""
        self.stopped = self.path / "stopped.json"
        """Why and after which step the last start was stopped, and INGOT_START of its ranks; none if it was not."""
        self.failed = self.path / "failed.json"
        """Why the last start failed (llm/cluster/failure.py); none if it did not."""
        self.restarts = self.path / "restarts.jsonl"
        """A line for each start by launch/supervise.py that has ended."""

    def claim(self) -> FileLock:
        """Rank 0, before the ranks meet: `create`, `lock` and `share_nonce`; returns what holds the lock.

        Before, for a second start must not reach the first one's port.
        """
        while True:
            made = sum(not path.exists() for path in (self.path, self.path.parent))
            self.create()
            try:
                held = self.lock()
                break
            except InputError:
                if self.path.exists():  # else a start that failed has held the lock, and removed all
                    raise
        self.share_nonce(made)
        return held

    @contextmanager
    def undone_on_failure(self, nonce: str) -> Iterator[None]:
        """Remove what a start has made, if it fails: by each rank, for a launcher may kill the others at once.

        A start that was stopped has not failed. nonce: that of the start. A folder that was there before stays, and so
        does one that another start has claimed.
        """
        try:
            yield
        except Stopped:
            raise
        except BaseException:
            _, _, made = nonce.partition(" ")
            with suppress(OSError):  # another rank was faster, or has begun another run
                if made in ("1", "2") and self.nonce() == nonce:
                    # Out of the way at once: a rank that fails meanwhile would write its record between two deletions.
                    doomed = self.path.with_name(f".{self.path.name}-{nonce[:8]}")
                    os.rename(self.path, doomed)
                    shutil.rmtree(doomed)
                    if made == "2":
                        self.path.parent.rmdir()
            raise

    def forget_the_end(self) -> None:
        """Rank 0: remove what says how the last start ended."""
        for path in (self.stopped, self.failed):
            path.unlink(missing_ok=True)

    def has(self, step: int) -> bool:
        """Whether there is a checkpoint of `step`, whole or not."""
        return (self.checkpoints / f"step-{step:08d}").exists()

    def create(self) -> None:
        """Make the folder where there is none; raises InputError where that cannot be, or it leads elsewhere."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            for entry in os.scandir(self.path):
                own = entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False)
                found = f"{entry.path} is {'a link' if entry.is_symlink() else 'no regular file'}"
                what = "expected files and folders of the run, and links of checkpoints alone"
                require(own or entry.name == self.checkpoints.name, f"{found}; {what}: move it away")
        except OSError as error:
            raise InputError(f"the run's folder {self.path} cannot be made: {error}") from error

    def lock(self) -> FileLock:
        """Refuse a second job: called by rank 0, which holds the lock until it releases it or ends, however.

        Raises InputError, saying who holds it, if it is not free within LOCK_PATIENCE_SECONDS.
        """
        advice = "wait for that run to end, stop it, or choose another --name"
        return locks.lock(self.path / "lock", LOCK_PATIENCE_SECONDS, advice)

    def share_nonce(self, made: int = 0) -> str:
        """Rank 0: write a new nonce into the folder and return it, to be sent to every rank.

        made: how many folders this start has made, 2 with that of all runs; the nonce says it.
        """
        nonce = f"{secrets.token_hex(16)} {made}"
        # In place, not by a rename: opening the same file anew is what NFS keeps consistent.
        with files.open_own(self.path / "nonce", "w") as file:
            file.write(nonce.encode())
            os.fsync(file.fileno())
        return nonce

    def nonce(self) -> str:
        """The nonce that is there; raises OSError."""
        return files.read_up_to(self.path / "nonce", 100).decode(errors="replace")

    def check_nonce(self, nonce: str) -> None:
        """Every rank: raise InputError unless the folder here holds the nonce that rank 0 sent."""
        try:
            found = self.nonce()
        except OSError as error:
            found = f"nothing ({error.strerror})"
        require(
            found == nonce,
            f"{socket.gethostname()} does not see what rank 0 wrote into {self.path}: {self.path.absolute()} holds "
            f"{found}, expected {nonce}; put the run's folder on a file system that all nodes share, and start on each "
            "in the same folder",
        )


def truncate_metrics(path: Path, step: int) -> int:
    """Drop the lines of steps after `step`, and those torn by a crash; returns how many.

    The file is replaced as a whole or not at all. No file is an empty one.
    """
    if not path.exists():
        return 0
    kept, dropped = list[bytes](), 0
    for line, record in files.json_lines(path):
        if record is not None and type(record.get("step")) is int and record["step"] <= step:
            kept.append(line)
        else:
            dropped += 1
    if dropped:
        files.replace(path, b"".join(kept))
    return dropped
