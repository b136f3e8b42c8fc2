"""datatrove: its executors run our tasks (Datatrove), our stages are steps of its (Source, Through, Sink)."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from datatrove.data import Document as TheirDocument
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from llm.crawl.counts import Counts
from llm.crawl.documents import Document, write_documents
from llm.crawl.settings import EngineConfig
from llm.crawl.tasks import Stage, Task, Works, run_task
from llm.errors import InputError

EXECUTORS = {"local": LocalPipelineExecutor, "slurm": SlurmPipelineExecutor, "ray": RayPipelineExecutor}
POLL = 5.0  # seconds between two looks at a job of Slurm
LATE = 60.0  # seconds after its end in which its files may still become visible here


class Datatrove:
    """Each task is one of its executor, which gets engine.workers and engine.options; its logs go to `logs`."""

    def __init__(self, works: Works, settings: EngineConfig, workers: int, logs: Path) -> None:
        self.works, self._settings, self._workers, self._logs = works, settings, workers, logs

    def __enter__(self) -> Datatrove:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, stage: str, tasks: Sequence[Task], progress: Callable[[int], None]) -> None:
        """As llm.crawl.tasks.Engine says. What is done is known by our reports, not by datatrove's marks."""
        given = dict(tasks=len(tasks), workers=self._workers, logging_dir=str(self._logs / stage), skip_completed=False)
        kind = self._settings.executor
        try:
            executor: Any = EXECUTORS[kind](
                pipeline=[Tasks(self.works, stage, tasks)], **given | self._settings.options
            )
        except TypeError as error:
            raise InputError(f"engine.options do not suit datatrove's executor {kind}: {error}") from error
        executor.run()
        ended = None
        while left := [task for task in tasks if not task.path(".json").exists()]:
            progress(sum(task.size for task in tasks) - sum(task.size for task in left))
            if kind != "slurm" or (ended is not None and time.monotonic() - ended > LATE):
                more = f" and {len(left) - 1} more" if len(left) > 1 else ""
                raise InputError(f"{left[0]}{more} did not finish: see {self._logs / stage}")
            time.sleep(POLL)
            queued = subprocess.run(["squeue", "-h", "-j", str(executor.job_id)], capture_output=True, text=True)
            ended = None if queued.stdout.strip() else ended or time.monotonic()
        progress(sum(task.size for task in tasks))


class Tasks(PipelineStep):
    """A whole stage as one step: rank r of n does every n-th task, from r on, and gives no documents."""

    name, type = "tasks", "ingot"

    def __init__(self, works: Works, stage: str, tasks: Sequence[Task]) -> None:
        super().__init__()
        self.works, self._stage, self._tasks = works, stage, [task.to_json() for task in tasks]

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> tuple[()]:
        """`data` is not read."""
        work = self.works(self._stage)
        for found in self._tasks[rank::world_size]:
            with self.track_time("task"):
                run_task(work, Task.from_json(found))
        return ()


class Source(PipelineStep):
    """A stage as the first step: rank r of n gives the documents of every n-th task, from r on."""

    name, type = "source", "ingot"

    def __init__(self, stage: Stage, tasks: Sequence[Task]) -> None:
        super().__init__()
        self._stage, self._tasks = stage, [task.to_json() for task in tasks]

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[TheirDocument]:
        """`data` is not read."""
        for found in self._tasks[rank::world_size]:
            counts = Counts()
            yield from map(theirs, self._stage.run(Task.from_json(found), counts))
            _tell(self, counts)


class Through(PipelineStep):
    """A stage that takes documents as they come, such as Filter, as any later step."""

    name, type = "through", "ingot"

    def __init__(self, stage: Applicable) -> None:
        super().__init__()
        self._stage = stage

    def run(self, data: Iterable[TheirDocument], rank: int = 0, world_size: int = 1) -> Iterator[TheirDocument]:
        counts = Counts()
        yield from map(theirs, self._stage.apply(ours(data, rank), counts))
        _tell(self, counts)


class Sink(PipelineStep):
    """Writes NNNNN.parquet, by the rank, which prepare_data.py and pretrain.py read; the last step."""

    name, type = "sink", "ingot"

    def __init__(self, folder: str) -> None:
        super().__init__()
        self._folder = folder

    def run(self, data: Iterable[TheirDocument], rank: int = 0, world_size: int = 1) -> tuple[()]:
        folder = Path(self._folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_documents(folder / f"{rank:05d}.parquet", ours(data, rank))
        return ()


class Applicable(Protocol):
    """What Through needs of a stage."""

    def apply(self, documents: Iterable[Document], counts: Counts) -> Iterator[Document]:
        """The documents that stay, in order."""
        ...


def theirs(document: Document) -> TheirDocument:
    """Our fields are in the metadata of datatrove's document."""
    about = {name: getattr(document, name) for name in ("url", "source", "offset", "language")}
    return TheirDocument(document.text, str(document.id), metadata=document.metadata | about)


def ours(documents: Iterable[TheirDocument], rank: int) -> Iterator[Document]:
    """Those of another reader get the rank and their number as the id; metadata becomes text."""
    for number, document in enumerate(documents):
        about = dict(document.metadata)
        names = {"url": "", "source": "", "offset": number, "language": ""}
        fields = {name: type(none)(about.pop(name, none)) for name, none in names.items()}
        key = int(document.id) if document.id.isdecimal() else rank << 32 | number
        yield Document(key, document.text, **fields, metadata={name: str(value) for name, value in about.items()})


def _tell(step: PipelineStep, counts: Counts) -> None:
    """Show in datatrove's statistics what a stage counted."""
    for reason, count in counts.removed.items():
        step.stat_update(f"dropped_{reason}", value=count)
    if counts.damage_count:
        step.stat_update("damage", value=counts.damage_count)
