"""Text corpora as streams of documents, in an order that depends only on the files' names."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

from llm.data.corpus.files import list_files, read_documents
from llm.errors import require

STDLIB = "stdlib"
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def describe_source(source: str) -> str:
    """Where the text comes from, for people."""
    return "source files of the Python standard library" if source == STDLIB else source


def stdlib_files() -> list[Path]:
    """Every .py file of the standard library but its tests and installed packages, sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    found = sorted(
        (path for path in root.rglob("*.py") if path.is_file() and not LEFT_OUT & set(path.relative_to(root).parts)),
        key=lambda path: path.relative_to(root).as_posix(),
    )
    require(
        bool(found),
        f"the Python standard library has no source files in {root}; "
        "use another Python or set data.source to a text file or folder",
    )
    return found


def read_corpus(source: str) -> Iterator[str]:
    """The documents of a corpus, never empty ones.

    Raises InputError naming the file, and the line where there is one, that cannot be used.
    """
    if source == STDLIB:
        # Empty files are package markers there, not documents.
        yield from read_documents([path for path in stdlib_files() if path.stat().st_size])
    else:
        yield from read_documents(list_files(Path(source)))
