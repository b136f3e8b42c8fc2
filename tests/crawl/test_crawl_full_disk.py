"""A disk that is really full, at many sizes, in every stage: one clear error, nothing half-written, and on it goes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from conftest import Made
from small_corpus import STAGES, arguments, command, environment, left_by
from small_disk import resize, small_disk

from llm.config.parse import parse
from llm.crawl.chain import tasks_of
from llm.crawl.engines.local import Local
from llm.crawl.restart import run_stage
from llm.crawl.settings import CorpusConfig
from llm.crawl.stages import CHAIN, work_of
from llm.errors import InputError

PAGE = 4096  # bytes: what a tmpfs gives out
LARGE = 64 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    with small_disk(folder, str(LARGE)):
        yield folder


def leave_room(disk: Path, pages: int) -> None:
    """Let there be so many free pages on the disk."""
    found = os.statvfs(disk)
    used = (found.f_blocks - found.f_bfree) * found.f_frsize
    resize(disk, str(used + pages * PAGE))


def failure(run: Callable[[], object]) -> str:
    """What is said of a failure, if there is one."""
    try:
        run()
    except InputError as error:
        return str(error)
    return ""


def rooms() -> Iterator[int]:
    """Few pages, then more and more."""
    pages = 1
    while pages < LARGE // PAGE // 2:
        yield pages
        pages += 1 + pages // 4


@pytest.mark.filterwarnings("error")  # what Python says when it cannot clean up
@pytest.mark.parametrize("stage", [STAGES[0], *(pytest.param(stage, marks=pytest.mark.slow) for stage in STAGES[1:])])
def test_a_stage_stops_cleanly_and_goes_on_with_more_room(made: Made, disk: Path, stage: str) -> None:
    out, link = disk / "out", CHAIN[STAGES.index(stage)]
    for before in STAGES[: STAGES.index(stage)]:
        shutil.copytree(made.out / before, out / before)
    config = parse(CorpusConfig, arguments(made.source, out), "prepare_data.py all")
    tasks, engine, failures = tasks_of(config, link), Local(partial(work_of, config), 1), 0
    for pages in rooms():
        leave_room(disk, pages)
        if message := failure(lambda: run_stage(stage, tasks, engine, lambda done: None)):
            advice = "make room, then run the same command again: finished tasks are kept"
            assert re.fullmatch(rf"({stage} task \d+ \(.+\): )?the disk of {out / stage} is full; {advice}", message)
            assert not [path for path in out.rglob("*") if ".tmp" in path.name]
            assert left_by(out).items() <= made.files.items()  # what is there is whole
            failures += 1
        else:
            break
    assert failures >= 2
    now = STAGES[: STAGES.index(stage) + 1]
    assert left_by(out) == {name: value for name, value in made.files.items() if Path(name).parts[0] in now}


@pytest.mark.slow
@pytest.mark.parametrize("room", [0, 8, 40, 100])
def test_the_command_says_it_in_one_line(made: Made, disk: Path, room: int) -> None:
    out = disk / "out"
    line = command(made.source, out, "--engine.workers=2")
    leave_room(disk, room)
    result = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 2
    full = "is full; make room|No space left on device"  # the second of the lock, before any stage
    assert re.search(rf"^error: .*{out}.*({full})", result.stderr, re.MULTILINE)
    assert "Traceback" not in result.stderr
    leave_room(disk, 1000)
    result = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert left_by(out) == made.files
