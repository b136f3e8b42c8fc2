"""The commands that run the stages from raw pages to token shards."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llm.config.parse import parse
from llm.crawl.engines.local import Local
from llm.crawl.inputs import input_tasks
from llm.crawl.report import page
from llm.crawl.report.totals import read_curve
from llm.crawl.restart import reports_of, run_stage
from llm.crawl.settings import CorpusConfig
from llm.crawl.stages import CHAIN, Link, work_of
from llm.crawl.tasks import Engine, Task, disk_errors, hash_of, identity_of
from llm.errors import require
from llm.locks import lock
from llm.progress import progress_bar


def tasks_of(config: CorpusConfig, link: Link, chain: Sequence[Link] = CHAIN) -> list[Task]:
    """The tasks of a stage. Raises InputError where a stage before it is not finished."""
    out = Path(config.out)
    folder = out / link.stage
    if link.each is None and not link.whole:
        return input_tasks(config.input, folder)
    outputs = {before.stage: before.output for before in chain}

    def read(stage: str) -> list[tuple[Path, str, int]]:
        """Each output of a stage, what it is known by, and the bytes of its documents."""
        name = outputs[stage]
        return [
            (out / stage / (f"{i:05d}{name}" if name[0] == "." else name), identity_of(report), report["bytes_out"])
            for i, report in enumerate(reports_of(out / stage))
        ]

    whole = [found for stage in link.whole for found in read(stage)]
    groups = [[found, *whole] for found in read(link.each)] if link.each else [whole]
    tasks = list[Task]()
    for number, group in enumerate(groups):
        paths, identities, sizes = zip(*group, strict=True)
        size = sizes[0] if link.each else sum(sizes)
        tasks.append(Task(number, paths, folder, identity=hash_of(identities), size=size))
    return tasks


def run_chain(config: CorpusConfig, command: str, engine: Engine) -> None:
    """Run the stages of a command, each with a bar that shows how far it is; print what came of each."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    held = lock(out / ".lock", patience=0, advice="wait for it, or choose another out")
    try:
        for link in CHAIN:
            if command in ("all", link.command):
                print(_run_link(config, link, engine), flush=True)
        if command in ("all", "report"):
            with disk_errors(out):
                print(f"report: {page.write(out)}")
    finally:
        held.release()


def _run_link(config: CorpusConfig, link: Link, engine: Engine) -> str:
    tasks = tasks_of(config, link)
    total = sum(task.size for task in tasks)
    with progress_bar() as bar:
        notes = run_stage(link.stage, tasks, engine, lambda done: bar(link.stage, done, total))
    notes.append(_summary(link.stage, reports_of(tasks[0].folder)))
    if link.stage == "cluster":
        from llm.crawl.dedup import curve

        notes.append(curve.table(read_curve(Path(config.out))))
    return "\n".join(notes)


def _summary(stage: str, reports: Sequence[dict[str, Any]]) -> str:
    """What the tasks of a stage did, in a line."""
    names = ("documents_in", "documents_out", "bytes_in", "bytes_out", "damage_count", "seconds")
    read, left, bytes_in, bytes_out, damage, seconds = (sum(report[name] for report in reports) for name in names)
    removed = sum((Counter[str](report["removed"]) for report in reports), Counter[str]())
    parts = [f"{read:,} documents, {bytes_in / 1e6:,.1f} MB in {seconds:,.1f} s" if bytes_in else f"{seconds:,.1f} s"]
    parts += [f"{left:,} left, {bytes_out / 1e6:,.1f} MB"] * bool(left or removed)
    parts += [f"removed: {', '.join(f'{count:,} {reason}' for reason, count in removed.most_common(4))}"] * bool(
        removed
    )
    parts += [f"{damage:,} damaged places"] * bool(damage)
    return f"{stage}: {'; '.join(parts)}"


@contextmanager
def engine_of(config: CorpusConfig) -> Iterator[Engine | None]:
    """The engine that the config asks for; None: this process has done its share of it, as a rank of MPI."""
    works, settings = partial(work_of, config), config.engine
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # not on macOS
    workers = settings.workers or cores or 1
    if settings.kind == "mpi":
        from llm.crawl.engines.mpi import Mpi

        engine = Mpi(works, settings.schedule)
    elif settings.kind == "datatrove":
        require(
            find_spec("datatrove") is not None, "engine.kind datatrove needs datatrove; pip install 'ingot[datatrove]'"
        )
        ray = settings.executor != "ray" or find_spec("ray") is not None
        require(ray, "engine.executor ray needs ray; pip install ray")
        from llm.crawl.engines.datatrove import Datatrove

        engine = Datatrove(works, settings, workers, Path(config.out) / ".datatrove")
    else:
        engine = Local(works, workers)
    with engine as found:
        yield found


def main(command: str, argv: list[str]) -> None:
    """Run a command, `all` or `report`, or a stage's, with the arguments that follow it."""
    argv = [re.sub(r"^--limit\b", "--input.limit", part) for part in argv]
    config = parse(CorpusConfig, argv, f"prepare_data.py {command}")
    require(bool(config.out), "out is not set; give the folder that everything is written to: --out=data/NAME")
    with engine_of(config) as engine:
        if engine is not None:
            run_chain(config, command, engine)
