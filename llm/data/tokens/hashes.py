"""Compares the SHA-256 of token files with their manifest, at once or while a run trains; samples files without one."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from llm.data.tokens.manifest import FileEntry, Manifest, locate
from llm.errors import InputError, require
from llm.files import open_regular, sha256_of

CHECKED_FILES = 64  # of each corpus when a run starts; the others are checked when they are first read
BLOCKS, BLOCK_BYTES = 64, 1 << 16  # read of a file for sampled_hash()
SAMPLED_BYTES = 1 << 26  # of all files of a corpus, at most


def file_entry(path: Path | str) -> FileEntry:
    """The manifest's entry for an existing file."""
    return FileEntry(os.stat(path).st_size, sha256_of(path))


def check_hash(path: str, entry: FileEntry, progress: Callable[[int], None] = lambda count: None) -> None:
    """Read the file and compare it with its entry; InputError says how it differs."""
    try:
        size = os.stat(path).st_size
        found = sha256_of(path, progress) if size == entry.bytes else ""
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    require(size == entry.bytes, f"{path} has {size} bytes; the manifest says {entry.bytes}")
    require(found == entry.sha256, f"{path}: sha256 {found}, the manifest says {entry.sha256}; the file is damaged")


def check_hashes(folder: Path, manifest: Manifest) -> None:
    """Read every file of the corpus and compare its size and hash; InputError names one that differs."""
    for name, entry in manifest.all_files().items():
        try:
            check_hash(locate(folder, name), entry)
        except InputError as error:
            raise InputError(f"{error}: remove the folder and prepare the data again") from error


def sampled_hash(paths: Sequence[str]) -> str:
    """SHA-256 over the size of every file and over blocks that lie evenly in it, its first and last bytes included.

    A file gives 64 blocks of 64 KiB; of more than 16 files, fewer and then smaller ones, 64 MiB in all but two each.
    Where they lie depends on the sizes alone. A change between blocks is not seen. Raises InputError.
    """
    blocks = min(BLOCKS, max(2, SAMPLED_BYTES // BLOCK_BYTES // len(paths)))
    length = min(BLOCK_BYTES, SAMPLED_BYTES // (blocks * len(paths)))
    digest = hashlib.sha256()
    for path in paths:
        try:
            with open(open_regular(path), "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                digest.update(size.to_bytes(8, "little"))
                for i in range(blocks):
                    digest.update(os.pread(file.fileno(), length, max(0, size - length) * i // (blocks - 1)))
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error}") from error
    return digest.hexdigest()


class _Ended(Exception):
    """close() was called."""


class HashCheck:
    """A thread that reads this rank's share of the files once, beside the trainer."""

    def __init__(self, files: Mapping[str, FileEntry], rank: int, ranks: int) -> None:
        """files: path -> size and hash; every ranks-th of them is read here."""
        self._files = sorted(files.items())[rank::ranks]
        self._damage: InputError | None = None
        self._ended = threading.Event()
        self.thread = threading.Thread(target=self._run, name="hashes", daemon=True)
        self.thread.start()

    def check(self) -> None:
        """Raise InputError, naming the file and both hashes, if a file read so far is not as its manifest says."""
        if damage := self._damage:
            raise InputError(f"{damage}: restore it, or run python launch/prepare_data.py again") from damage

    def close(self) -> None:
        """End the thread, at the latest when it has read one more block; check() still answers."""
        self._ended.set()
        self.thread.join()

    def _run(self) -> None:
        if sys.platform == "linux":  # where 0 is this thread alone: the trainer goes first
            os.setpriority(os.PRIO_PROCESS, 0, 19)
        try:
            for path, entry in self._files:
                check_hash(path, entry, self._go_on)
        except InputError as error:
            self._damage = error
        except _Ended:
            pass

    def _go_on(self, _: int) -> None:
        if self._ended.is_set():
            raise _Ended
