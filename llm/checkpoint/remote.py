"""A second copy of a run's checkpoints at an fsspec URL: made beside the run, and resumed from where it is newer.

A copy is a checkpoint once its manifest is there, which is written last and deleted first. Nothing of what is read
there is trusted: names are checked before they reach a path, and every byte is hashed.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import fsspec
from fsspec.callbacks import Callback
from fsspec.implementations.local import LocalFileSystem

from llm import files
from llm.checkpoint.manifest import LARGEST_MANIFEST, LARGEST_STATE, MANIFEST, Manifest
from llm.checkpoint.reader import load_manifest, verify
from llm.checkpoint.writer import STEP_FOLDER, folder_name, outdated, put_aside, step_of
from llm.errors import CheckpointError, InputError, ReadError

T = TypeVar("T")
PIECE = 16 << 20  # bytes of one request
STREAMS = 8  # files under way at a time
WAITS = (1.0, 5.0, 25.0)  # seconds before a request that failed is made again
POLL_SECONDS = 1.0


class Answered(Callback):
    """Notes when a remote has answered: a request, or of a file a piece, where its file system tells."""

    def __init__(self) -> None:
        super().__init__()
        self.last = time.monotonic()

    def call(self, *hook: Any, **options: Any) -> None:
        self.last = time.monotonic()


class Remote:
    """The checkpoints of one run in the folder `url`/`name`."""

    def __init__(self, url: str, name: str) -> None:
        """Raises InputError where fsspec cannot open such a URL."""
        try:
            self.system, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:  # the protocol's package is missing, or there is no such protocol
            raise InputError(f"checkpoint.copy_to {url} cannot be opened: {error}") from error
        self.root, self.url = f"{root.rstrip('/')}/{name}", f"{url.rstrip('/')}/{name}"
        self.answered = Answered()

    def names(self) -> list[str]:
        """Of the checkpoints there that have a manifest, newest first. Raises ReadError."""
        return [name for name in self._folders() if self._is_there(f"{name}/{MANIFEST}")]

    def put(self, folder: Path, *, keep_last: int, keep_every: int | None) -> None:
        """Copy a whole checkpoint, and keep there what is kept here. Raises CheckpointError, ReadError."""
        manifest, names, step = load_manifest(folder), self.names(), step_of(folder)
        text, target = (folder / MANIFEST).read_bytes(), f"{self.root}/{folder.name}"
        if folder.name in names and self._read(f"{folder.name}/{MANIFEST}", LARGEST_MANIFEST) == text:
            return
        for name in self._folders():
            if name not in names:  # an earlier copy was not finished
                self._try(self.system.rm, f"{self.root}/{name}", recursive=True)
            elif step_of(Path(name)) >= step:  # from a history that was left: a run would resume from it
                aside = next(free for n in count(1) if not self._is_there(free := f"{name}.aside-{n}"))
                self._try(self.system.mv, f"{self.root}/{name}", f"{self.root}/{aside}", recursive=True)
        self._try(self.system.makedirs, target, exist_ok=True)
        in_daemons(lambda file: self._try(self.put_file, f"{folder}/{file}", f"{target}/{file}"), manifest.files)
        self._try(self.system.pipe_file, f"{target}/{MANIFEST}", text)
        state = files.read_json(folder / "state.json", LARGEST_STATE)
        best = folder_name(state.get("best", {}).get("step", step))
        earlier = [name for name in names if step_of(Path(name)) < step]
        for name in (name for name in outdated(earlier, keep_last, keep_every) if name != best):
            self._try(self.system.rm_file, f"{self.root}/{name}/{MANIFEST}")
            self._try(self.system.rm, f"{self.root}/{name}", recursive=True)

    def put_file(self, here: str, there: str) -> None:
        """Copy a file, of every piece of which `answered` is told."""
        local = isinstance(self.system, LocalFileSystem)  # its own tells nothing before the file is whole
        put: Any = partial(fsspec.AbstractFileSystem.put_file, self.system) if local else self.system.put_file
        put(here, there, callback=self.answered)

    def get(self, name: str, root: Path, say: Callable[[str], None]) -> None:
        """Copy a checkpoint to root/name. Raises CheckpointError where it is damaged there, ReadError."""
        text = self._read(f"{name}/{MANIFEST}", LARGEST_MANIFEST)
        manifest = Manifest.from_json(text)  # which checks the names of the files
        manifest.check_coverage()
        if manifest.step != step_of(Path(name)):
            raise CheckpointError(f"{self.url}/{name} is of step {manifest.step}")
        final, partial = root / name, root / f"{name}.tmp"
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        files.check_room(partial, sum(entry.size for entry in manifest.files.values()))
        partial.mkdir(mode=0o700)

        def fetch(file: str) -> None:
            entry = manifest.files[file]
            starts = range(0, entry.size, PIECE)
            pieces = (self._read(f"{name}/{file}", min(PIECE, entry.size - start), start) for start in starts)
            algorithm, expected = entry.hash
            if files.create(partial / file, pieces, entry.size, algorithm) != expected:
                what = f"{self.url}/{name}/{file} is damaged"
                raise CheckpointError(f"{what}: its {algorithm} is not that of the manifest")

        with ThreadPoolExecutor(STREAMS) as pool:
            list(pool.map(fetch, manifest.files))
        files.create_bytes(partial / MANIFEST, text)
        files.sync_folder(partial)
        if os.path.lexists(final):
            put_aside(final, "its copy is whole", say)
        os.rename(partial, final)
        files.sync_folder(root)

    def _folders(self) -> list[str]:
        """Names of steps, newest first."""
        self.system.invalidate_cache()
        try:
            paths = self._try(self.system.ls, self.root, detail=False)
        except FileNotFoundError:
            return []
        names = {path.rstrip("/").rpartition("/")[2] for path in paths}
        found = [name for name in names if STEP_FOLDER.fullmatch(name) and not name.endswith(".old")]
        return sorted(found, key=lambda name: step_of(Path(name)), reverse=True)

    def _is_there(self, name: str) -> bool:
        """Not by `exists`, which takes any error for a no. Raises ReadError."""
        with suppress(FileNotFoundError):
            self._try(self.system.info, f"{self.root}/{name}")
            return True
        return False

    def _read(self, name: str, most: int, start: int | None = None) -> bytes:
        try:
            return self._try(files.remote_bytes, self.system, f"{self.root}/{name}", most, start)
        except FileNotFoundError as error:
            raise CheckpointError(f"{self.url}/{name} is not there") from error

    def _try(self, request: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """What a request gives, made again where it fails. Raises FileNotFoundError, or ReadError after the last."""
        waits = list(WAITS)
        while True:
            try:
                result = request(*arguments, **options)
                self.answered.call()
                return result
            except (FileNotFoundError, CheckpointError):
                raise
            except Exception as error:  # each file system raises classes of its own
                if not waits:
                    why = f"{request.__name__} failed: {type(error).__name__}: {error}"
                    raise ReadError(f"{self.url}: {why}") from error
            self.answered.call()
            time.sleep(waits.pop(0))


def in_daemons(action: Callable[[T], object], items: Iterable[T]) -> None:
    """Call `action` on each item, STREAMS at a time, and raise what the first that failed has raised.

    Not by a pool: the end of a process waits for its threads, and a request may never return.
    """
    waiting, errors = iter([*items]), list[Exception]()

    def work() -> None:
        for item in waiting:
            try:
                action(item)
            except Exception as error:  # noqa: BLE001 - raised below
                errors.append(error)
            if errors:
                return

    threads = [threading.Thread(target=work, name="copy", daemon=True) for _ in range(STREAMS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


class Mirror:
    """Copies checkpoints to a Remote, beside the run, one at a time."""

    def __init__(
        self, remote: Remote, *, say: Callable[[str], None], patience: float | None = None, **keep: Any
    ) -> None:
        """patience: seconds without an answer until a copy is not waited for; None: any. keep: as `Remote.put`'s."""
        self.remote, self.say, self.patience, self.keep = remote, say, patience, keep
        self.newest: Path | None = None
        self.copying: Path | None = None
        """The checkpoint that must not be deleted now."""
        self.waiting: SimpleQueue[Path | None] = SimpleQueue()
        self.thread = threading.Thread(target=self._copy_all, name="copy", daemon=True)
        self.thread.start()

    def begin(self, folder: Path) -> None:
        """Copy a checkpoint when the one before is copied; one that waits is left out when a newer one comes."""
        self.newest = folder
        self.waiting.put(folder)
        self._hangs()

    def close(self) -> None:
        """Wait for the copy under way, unless it hangs."""
        self.waiting.put(None)
        while self.thread.is_alive() and not self._hangs():
            self.thread.join(POLL_SECONDS)

    def _hangs(self) -> bool:
        """Whether the copy under way has had no answer for `patience`, which is said."""
        folder, silent = self.copying, time.monotonic() - self.remote.answered.last
        hangs = folder is not None and self.patience is not None and silent > self.patience
        if hangs:
            what = f"{self.remote.url} has not answered for {silent:.0f} s"
            self.say(f"warning: {folder} is not copied: {what}; no other is copied before it answers")
        return hangs

    def _copy_all(self) -> None:
        while (folder := self.waiting.get()) is not None:
            if folder == self.newest:
                self._copy(folder)

    def _copy(self, folder: Path) -> None:
        self.remote.answered.call()  # not yet asked
        self.copying = folder
        try:
            self.remote.put(folder, **self.keep)
            self.say(f"{folder.name} is copied to {self.remote.url}")
        except Exception as error:  # noqa: BLE001 - whatever it is, the run goes on, and the next one is tried
            self.say(f"warning: {folder} is not copied: {error}")
        self.copying = None


def find_or_fetch(
    root: Path,
    remote: Remote,
    find: Callable[..., tuple[Path | None, list[str]]],
    wanted: int | None,
    say: Callable[[str], None],
    check: Callable[[Path], Manifest] = verify,
) -> tuple[Path | None, list[str]]:
    """What `find(root, check=check)` gives, once a checkpoint is fetched that is newer than all that is whole here.

    wanted: the step that `find` looks for, None for the newest. Raises InputError where there are checkpoints, here or
    there, but none can be used, and ReadError where there is nothing here and `remote` cannot be read.
    """
    found, warnings, failure = None, [], None
    try:
        found, warnings = find(root, check=check)
    except InputError as error:
        failure = error
    try:
        names = remote.names()
    except ReadError as error:
        if found is None:
            raise
        return found, [*warnings, f"{error}; the run goes on from what is here"]
    names = [n for n in names if found is None or (wanted is None and step_of(Path(n)) > step_of(found))]
    if wanted is not None:  # the newest may have been saved after the run went back to that step
        names = [*names[:1], *[n for n in names[1:] if step_of(Path(n)) == wanted]]
    for name in names:
        try:
            remote.get(name, root, say)
        except CheckpointError as error:
            warnings = [*warnings, f"{remote.url}/{name} cannot be used: {error}"]
            continue
        say(f"{name} is copied from {remote.url}")
        with suppress(InputError):
            found, more = find(root, check=check)
            return found, [*warnings, *more]
    if found is None and (failure is not None or names):  # to begin anew would write over what may be mended
        raise InputError("\n  ".join([str(failure or f"no checkpoint at {remote.url} can be used"), *warnings]))
    return found, warnings
