"""Text corpora as streams of documents, in an order that depends only on the files' names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from llm.data.corpus.files import list_files, read_documents
from llm.data.corpus.stdlib import stdlib_files

STDLIB = "stdlib"


def describe_source(source: str) -> str:
    """Where the text comes from, for people."""
    return "source files of the Python standard library" if source == STDLIB else source


def read_corpus(source: str) -> Iterator[str]:
    """The documents of a corpus, never empty ones.

    Raises InputError naming the file, and the line where there is one, that cannot be used.
    """
    if source == STDLIB:
        # Empty files are package markers there, not documents.
        yield from read_documents([path for path in stdlib_files() if path.stat().st_size])
    else:
        yield from read_documents(list_files(Path(source)))
