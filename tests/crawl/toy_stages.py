"""Stages that are small and can be made to wait, fail or die, for tests of what runs stages."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llm.crawl.chain import tasks_of
from llm.crawl.counts import Counts
from llm.crawl.documents import Document, read_documents
from llm.crawl.engines.local import Local
from llm.crawl.restart import run_stage
from llm.crawl.settings import CorpusConfig, InputConfig
from llm.crawl.stages import Link
from llm.crawl.tasks import Engine, Task
from llm.errors import InputError
from llm.files import complete_file

LINKS = (
    Link("lines", "lines"),
    Link("even", "even", each="lines"),
    Link("total", "total", whole=("even",), output=".txt"),
    Link("numbered", "numbered", each="even", whole=("total",)),
)
"""Chain of the toy stages: in all three forms that a link has."""


@dataclass(frozen=True)
class ToySettings:
    pause: float = 0.0
    least: int = 2


@dataclass(frozen=True)
class Toy:
    """Does what the line `!NAME` of its input says, once: `die`, `fail` or `defect`."""

    name: str
    settings: ToySettings = ToySettings()
    version: int = 1

    def run(self, task: Task, counts: Counts) -> Iterator[Document]:
        for document in self._documents(task):
            counts.documents_in += 1
            counts.bytes_in += len(document.text)
            if self.settings.pause:
                time.sleep(self.settings.pause)
            if document.text.startswith("!"):
                _obey(document.text[1:], task.folder)
            if self.name == "even" and len(document.text) % self.settings.least:
                counts.remove("odd", document)
                continue
            yield document

    def _documents(self, task: Task) -> Iterator[Document]:
        if self.name == "lines":
            (task.folder / "log").open("a").write(f"{task.number}\n")
            for number, line in enumerate(task.inputs[0].read_text().splitlines()[: task.limit]):
                yield Document(task.number << 32 | number, line, "", task.source, number)
            return
        total = task.inputs[-1].read_text() if self.name == "numbered" else ""
        for document in read_documents(task.inputs[0]):
            yield replace(document, metadata={"total": total}) if total else document


@dataclass(frozen=True)
class Total:
    """How many documents all tasks have."""

    name: str = "total"
    settings: ToySettings = ToySettings()
    version: int = 1

    def write(self, task: Task, counts: Counts) -> None:
        counts.documents_in = sum(1 for path in task.inputs for _ in read_documents(path))
        with complete_file(task.path(".txt")) as file:
            file.write(str(counts.documents_in).encode())


def _obey(order: str, folder: Path) -> None:
    mark = folder.with_name(f"{order}.done")
    if mark.exists():
        return
    mark.touch()
    if order == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if order == "fail":
        raise InputError("the order was to fail")
    if order == "defect":
        raise KeyError("the order was to be wrong")


def toys(stage: str, settings: ToySettings = ToySettings()) -> Toy | Total:
    """The toy stages by their names."""
    return Total(settings=settings) if stage == "total" else Toy(stage, settings)


def slow_toys(stage: str) -> Toy | Total:
    return toys(stage, ToySettings(pause=0.004))


def run_toys(source: Path | str, out: Path, engine: Engine, links: Sequence[Link] = LINKS) -> list[str]:
    """Run the toy chain; its notes."""
    config, notes = CorpusConfig(str(out), InputConfig(str(source))), list[str]()
    for link in links:
        notes += run_stage(link.stage, tasks_of(config, link, LINKS), engine, lambda done: None)
    return notes


def write_input(folder: Path, files: int = 5, lines: int = 40) -> Path:
    """Files of lines of different lengths."""
    folder.mkdir()
    for i in range(files):
        text = "\n".join("x" * (1 + (7 * i + 3 * line) % 11) + str(line) for line in range(lines + 9 * i))
        (folder / f"{i}.txt").write_text(text)
    return folder


def content(out: Path) -> dict[str, str]:
    """What must be the same on any engine: all that the stages left, but for the times in the reports."""
    found = {}
    for path in sorted(out.glob("*/*")):
        data = path.read_bytes()
        if path.suffix == ".json" and path.stem.isdecimal():
            report = json.loads(data)
            assert report.pop("seconds") >= 0
            data = json.dumps(report, sort_keys=True).encode()
        if path.name != "log":
            found[f"{path.parent.name}/{path.name}"] = hashlib.sha256(data).hexdigest()
    return found


if __name__ == "__main__":  # in a process of its own, to be killed
    if sys.argv[3].isdecimal():
        with Local(slow_toys, int(sys.argv[3])) as local:
            run_toys(sys.argv[1], Path(sys.argv[2]), local)
    else:
        from llm.crawl.engines.mpi import Mpi

        with Mpi(toys, sys.argv[3]) as lead:
            if lead is not None:
                run_toys(sys.argv[1], Path(sys.argv[2]), lead)
