"""A remote file on this machine's disk, for as long as it is read."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm.errors import InputError


@contextmanager
def fetched(url: str, folder: Path) -> Iterator[Path]:
    """A copy of the file at a URL, in a folder that is made for it and removed with it. Raises InputError."""
    import fsspec  # a tenth of a second, which tasks with files on disk can save

    folder.mkdir(exist_ok=True)
    try:
        try:
            system, name = fsspec.core.url_to_fs(url)
            path = folder / Path(name).name
            system.get_file(name, str(path))
        except OSError:  # of this disk, or as good as a message of the store's
            raise
        except Exception as error:  # each file system raises classes of its own
            raise InputError(f"{url} cannot be read: {type(error).__name__}: {error}; run again") from error
        yield path
    finally:
        shutil.rmtree(folder, ignore_errors=True)
