"""Text corpora as streams of documents, in an order that depends only on the files' names."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from llm.data.corpus.files import kind_of, list_files
from llm.data.corpus.tables import read_table
from llm.data.corpus.texts import Document, read_json, read_txt
from llm.errors import require

STDLIB = "stdlib"
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def stdlib_files() -> list[Path]:
    """Every .py file of the standard library but its tests and installed packages, sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    kept = (path for path in root.rglob("*.py") if path.is_file() and not LEFT_OUT & set(path.relative_to(root).parts))
    found = sorted(kept, key=Path.as_posix)
    require(
        bool(found),
        f"the Python standard library has no source files in {root}; "
        "use another Python or set data.source to a text file or folder",
    )
    return found


class TextCorpus:
    """The documents of `stdlib`, a file, a folder or a glob."""

    def __init__(self, source: str, text_key: str = "text", skip_empty: bool = True) -> None:
        """text_key: the field of JSON, Parquet and Arrow files. skip_empty: else an empty document is an error.

        Raises InputError where there is no file to read.
        """
        self._source, self._key, self._skip_empty = source, text_key, skip_empty
        self.others: dict[str, int] = {}
        """Files of other kinds, passed over, by suffix."""
        self.empty = 0
        """Documents without text, null or in an empty file, that have been passed over."""
        if source == STDLIB:
            # Empty files are package markers there, not documents.
            self._files = [path for path in stdlib_files() if path.stat().st_size]
        else:
            self._files, self.others = list_files(source)

    def documents(self) -> Iterator[Iterable[str]]:
        """The pieces of each document, to be gone through before the next is asked for. No document is empty.

        Raises InputError naming the file, and the line or row where there is one, that cannot be used.
        """
        self.empty, count = 0, 0
        for path in self._files:
            found = _read(path, self._key)
            for place, document in chain([next(found, (str(path), ()))], found):
                if document:
                    yield document
                    count += 1
                    continue
                require(self._skip_empty, f"{place}: found no text; set data.empty=skip to pass over what is empty")
                self.empty += 1
        require(count > 0, f"data.source {self._source} holds no text: found {self.empty} empty documents or files")


def _read(path: Path, key: str) -> Iterator[Document]:
    kind = kind_of(path)
    if kind in (None, "txt"):
        return read_txt(path)
    return read_table(path, key) if kind in ("parquet", "arrow", "feather") else read_json(path, key)


def read_corpus(source: str, text_key: str = "text") -> Iterator[str]:
    """The whole documents of a corpus, never empty ones; InputError as TextCorpus.documents()."""
    return map("".join, TextCorpus(source, text_key).documents())
