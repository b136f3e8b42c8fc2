"""What a stage does, cut into tasks: the same output on any engine, and none repeated after an interruption.

A task is one input file of a stage. It is done when its report, NNNNN.json, lies in the stage's folder beside its
output: that is written last. What was interrupted left only names that end in .tmp, which are removed.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from llm.crawl.counts import Counts
from llm.crawl.documents import Document, size_of, write_documents
from llm.crawl.fetch import fetched
from llm.errors import CheckpointError, InputError, ReadError
from llm.files import complete_file, read_json, sync_folder

Works = Callable[[str], "Work"]  # a stage by its name
Tell = Callable[[int], None]  # called with the bytes of its input that a task has gone through


@dataclass(frozen=True)
class Task:
    """One file of a stage's input, or all of them where a stage is one task."""

    number: int
    inputs: tuple[Path, ...]
    """A file of the raw input, or the outputs of earlier stages' tasks."""
    folder: Path
    """Where the stage's output goes."""
    source: str = ""
    """How the first stage's documents call the file: relative to the input's folder."""
    limit: int | None = None
    """Records to read, at most."""
    url: str | None = None
    """Where the input is fetched from, if it lies elsewhere."""
    identity: str = ""
    """SHA-256 of what the input is known by."""
    size: int = 0
    """Bytes of the input, as Counts.bytes_in counts them."""

    def path(self, suffix: str) -> Path:
        """A file of the task's output."""
        return self.folder / f"{self.number:05d}{suffix}"

    def to_json(self) -> dict[str, Any]:
        """What `Task.from_json` reads back."""
        return dataclasses.asdict(self) | {"inputs": list(map(str, self.inputs)), "folder": str(self.folder)}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Task:
        return cls(**found | {"inputs": tuple(map(Path, found["inputs"])), "folder": Path(found["folder"])})

    def __str__(self) -> str:
        return f"{self.folder.name} task {self.number} ({self.source or self.inputs[0].name})"


class Work(Protocol):
    """What is common to all stages. What a task writes depends on its input, the settings and the version alone."""

    name: str
    """The name of its folder."""
    version: int
    """Is raised when the output changes."""
    settings: Any
    """A frozen dataclass of what the output depends on."""


@runtime_checkable
class Stage(Work, Protocol):
    """Documents in, documents out: NNNNN.parquet."""

    def run(self, task: Task, counts: Counts) -> Iterator[Document]:
        """The documents of a task, in order.

        It counts documents_in and bytes_in as it goes, and what it removes; those that come out are counted for it.
        """
        ...


@runtime_checkable
class Step(Work, Protocol):
    """Any other output."""

    def write(self, task: Task, counts: Counts) -> None:
        """Write the files task.path(...), each by llm.files.complete_file; temporary names end in .tmp."""
        ...


class Engine(Protocol):
    """Runs tasks, in any order and place."""

    works: Works

    def run(self, stage: str, tasks: Sequence[Task], progress: Callable[[int], None]) -> None:
        """Return when all are done; `progress` is called with the bytes of input that they have gone through.

        Raises InputError, which names the task, where one fails or what runs it dies.
        """
        ...


def run_task(work: Work, task: Task, tell: Tell = lambda done: None) -> None:
    """Do one task and write its report. Raises InputError: a full disk among others."""
    counts, began = Counts(), time.monotonic()
    with disk_errors(task.folder), ExitStack() as stack:
        if task.url:
            copy = stack.enter_context(fetched(task.url, task.path(".fetched.tmp")))
            task = replace(task, inputs=(copy,))
        if isinstance(work, Stage):
            write_documents(task.path(".parquet"), _counted(work.run(task, counts), counts, tell))
        else:
            assert isinstance(work, Step), work
            work.write(task, counts)
        sync_folder(task.folder)
        found = {"stage": work.name, "task": task.number, "config": config_of(work), "input": task.identity}
        report = found | vars(counts) | {"seconds": round(time.monotonic() - began, 3)}
        write_report(task.path(".json"), report)


def _counted(documents: Iterable[Document], counts: Counts, tell: Tell) -> Iterator[Document]:
    for document in documents:
        yield document
        counts.documents_out += 1
        counts.bytes_out += size_of(document.text)
        tell(counts.bytes_in)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk into an InputError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        advice = "make room, then run the same command again: finished tasks are kept"
        raise InputError(f"the disk of {folder} is full; {advice}") from error


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write JSON, completely or not at all, the same bytes for the same content."""
    with complete_file(path) as file:
        file.write((json.dumps(report, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())


def read_report(path: Path) -> dict[str, Any]:
    """A task's report; raises InputError."""
    try:
        return read_json(path)
    except (CheckpointError, ReadError) as error:
        raise InputError(f"{path} cannot be read: {error}; remove it, and run its stage again") from error


def hash_of(content: Any) -> str:
    """SHA-256, in hex, of what JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def config_of(work: Work) -> str:
    """The hash of what `described` gives."""
    return hash_of(described(work))


def identity_of(report: dict[str, Any]) -> str:
    """What a task's output is known by: its report but for the time that it took."""
    return hash_of({key: value for key, value in report.items() if key != "seconds"})


def described(work: Work) -> dict[str, Any]:
    """All that a stage's output depends on beside its input."""
    settings = json.loads(json.dumps(dataclasses.asdict(work.settings)))
    return {"stage": work.name, "version": work.version, "settings": settings}
