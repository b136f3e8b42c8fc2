"""Copies remote corpora, through fsspec. Sizes and hashes are checked, and an incomplete copy has no manifest.

The manifest is read first and written last. Each file arrives under its name with `.part` behind it, goes on where an
earlier transfer stopped, and takes its name when its hash is right. One process at a time copies. Others wait for it
and find the work done.

Some of fsspec's stores repeat a request that failed (s3fs, gcsfs; not HTTP), so nothing here does. Its own get() would
begin a file anew after an interruption, and compares no hashes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import fsspec

from llm.config import RunConfig
from llm.data.corpora import blends_of
from llm.data.prepare.tokenise import Progress
from llm.data.samples.schedule import corpus_names
from llm.data.tokens.folder import copy_folder, is_url, lock
from llm.data.tokens.manifest import (
    FILE_NAME,
    LARGEST_MANIFEST,
    FileEntry,
    Manifest,
    check_links,
    check_places,
    parse_manifest,
    read_manifest,
)
from llm.errors import InputError, require
from llm.files import open_regular, remote_bytes, sha256_of

PIECE = 16 << 20  # bytes of one request
STREAMS = 8  # files under way at a time: one stream seldom fills a line to an object store


def fetch_corpora(config: RunConfig, progress: Progress = lambda stage, done, total: None) -> None:
    """Bring a copy of every remote corpus of the run into data.cache; nothing for those that are there."""
    names = (*corpus_names(blends_of(config)), config.data.path or "")
    for url in dict.fromkeys(filter(is_url, names)):
        fetch(url, copy_folder(config, url), progress)


def fetch(url: str, folder: Path, progress: Progress = lambda stage, done, total: None) -> Manifest:
    """Copy the corpus whose manifest.json lies at `url` into `folder`, or go on with such a copy; its manifest.

    Raises InputError where it cannot be read, is damaged or incomplete there, or `folder` is a copy of something else.
    """
    try:
        system, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # the protocol's package is missing, or there is no such protocol
        raise InputError(f"{url} cannot be opened: {error}") from error
    remote = _Remote(url.rstrip("/"), system, root.rstrip("/"))
    raw = remote.read(FILE_NAME, LARGEST_MANIFEST)
    try:
        wanted = parse_manifest(raw)
        away = next((name for name in wanted.all_files() if name.startswith("/")), None)
        require(away is None, f"it lists {away}, which lies outside its folder: such a corpus cannot be copied")
        check_places([FILE_NAME, *chain(*((name, f"{name}.part") for name in wanted.all_files()))])
    except InputError as error:
        raise InputError(f"{remote.url}/{FILE_NAME}: {error}") from error
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder):
        if (folder / FILE_NAME).exists():
            found = read_manifest(folder)
            same = _without_plans(found) == _without_plans(wanted)
            require(same, f"{url} is not what it was when {folder} was copied; remove that folder to copy it again")
            _check_sizes(folder, found)
            return found
        try:
            _copy(remote, wanted, folder, progress)
        except OSError as error:
            raise InputError(f"{folder} cannot be written: {error}") from error
        wanted.save(folder)
        return wanted


@dataclass(frozen=True)
class _Remote:
    """A folder on a remote file system."""

    url: str
    system: Any  # fsspec's AbstractFileSystem
    root: str

    def read(self, name: str, most: int, start: int | None = None) -> bytes:
        try:
            return remote_bytes(self.system, f"{self.root}/{name}", most, start)
        except Exception as error:  # each file system raises classes of its own
            what = f"{type(error).__name__}: {error}; run again to go on from there"
            raise InputError(f"{self.url}/{name} cannot be read: {what}") from error


def _without_plans(manifest: Manifest) -> Manifest:
    """The manifest but for packing plans, which prepare_data.py adds to a copy."""
    files = {name: entry for name, entry in manifest.files.items() if not name.endswith(".plan")}
    return replace(manifest, files=files)


def _check_sizes(folder: Path, manifest: Manifest) -> None:
    for name, entry in manifest.all_files().items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        require(
            found == entry.bytes,
            f"{path} {'is missing' if found is None else f'has {found} bytes'}; the manifest says {entry.bytes} bytes; "
            "remove the folder to copy it again",
        )


def _copy(remote: _Remote, manifest: Manifest, folder: Path, progress: Progress) -> None:
    files = manifest.all_files()
    check_links(folder, [*files, *(f"{name}.part" for name in files)])
    total, done = sum(entry.bytes for entry in files.values()), 0
    counting, given_up = threading.Lock(), threading.Event()

    def count(n: int) -> None:
        nonlocal done
        require(not given_up.is_set(), f"copying {remote.url} was given up")
        with counting:
            done += n
            progress(f"copying {remote.url}", done, total)

    with ThreadPoolExecutor(STREAMS) as pool:
        waiting = [pool.submit(_copy_file, remote, name, entry, folder / name, count) for name, entry in files.items()]
        try:
            for future in wait(waiting, return_when=FIRST_EXCEPTION).done:
                future.result()
        finally:  # after a failure or Ctrl-C the other streams end at their next piece
            given_up.set()
            pool.shutdown(cancel_futures=True)


def _copy_file(remote: _Remote, name: str, entry: FileEntry, path: Path, count: Callable[[int], None]) -> None:
    """Bring one complete file to its place; `count` is called with the bytes that have come."""
    if path.exists():  # of an earlier transfer, maybe of what the remote folder held then
        if path.stat().st_size == entry.bytes:
            if sha256_of(path, count) == entry.sha256:
                return
            count(-entry.bytes)
        path.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    kept = done = part.stat().st_size if part.exists() else 0
    count(done)
    with open(open_regular(part, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666), "ab") as file:
        while done < entry.bytes:
            stop = min(done + PIECE, entry.bytes)
            piece = remote.read(name, stop - done, done)
            require(
                len(piece) == stop - done,
                f"{remote.url}/{name}: {len(piece)} bytes came from {done} on, {stop - done} were asked for; its "
                f"manifest says {entry.bytes} bytes in all: the file is cut short, or its server ignores ranges",
            )
            file.write(piece)
            done = stop
            count(len(piece))
        file.flush()
        os.fsync(file.fileno())
    found = sha256_of(part, lambda _: count(0))  # which ends it when the copy is given up
    if found == entry.sha256:
        part.rename(path)
        return
    part.unlink()
    if not kept:
        raise InputError(
            f"{remote.url}/{name}: sha256 {found} of what came, its manifest says {entry.sha256}; "
            "run again to copy it anew; if that does not help, the file is damaged there"
        )
    count(-done)
    _copy_file(remote, name, entry, path, count)  # what an earlier transfer left was of another file
