"""The whole chain, with its real stages: the same bytes on any engine, and after kills at random moments."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from conftest import Made
from small_corpus import STAGES, arguments, command, environment, left_by

from llm.crawl.chain import main
from llm.crawl.documents import Document, read_documents
from llm.crawl.extract.settings import ExtractConfig
from llm.crawl.extract.stage import Extract
from llm.crawl.filter.settings import FilterConfig
from llm.crawl.filter.stage import Filter
from llm.crawl.inputs import input_tasks
from llm.crawl.restart import reports_of
from llm.crawl.settings import InputConfig
from llm.crawl.stages import CHAIN

SECONDS = 300  # that a chain may take, at most


def test_the_small_crawl_has_something_for_every_stage(made: Made) -> None:
    assert tuple(link.stage for link in CHAIN) == STAGES
    found = {stage: reports_of(made.out / stage) for stage in STAGES}
    assert [len(found[stage]) for stage in STAGES] == [7, 7, 7, 1, 7, 1, 7, 1]
    removed = {reason for reports in found.values() for report in reports for reason in report["removed"]}
    assert removed >= {"extract.status", "language.fr", "dedup.exact", "dedup.near"}
    assert sum(report["damage_count"] for report in found["extract"]) == 3
    assert found["tokens"][0]["documents_out"] > 30
    for stage in ("extract", "filter", "dedup"):
        texts = [one.text for path in made.out.glob(f"{stage}/*.parquet") for one in read_documents(path)]
        assert sum(report["bytes_out"] for report in found[stage]) == sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize("workers", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_processes_leaves_the_same_bytes(made: Made, tmp_path: Path, workers: int) -> None:
    main("all", arguments(made.source, tmp_path / "out", f"--engine.workers={workers}"))
    assert left_by(tmp_path / "out") == made.files


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "schedule"), [(2, "dynamic"), (3, "dynamic"), (2, "striped"), (3, "striped")])
def test_ranks_leave_the_same_bytes(made: Made, tmp_path: Path, ranks: int, schedule: str) -> None:
    if shutil.which("mpirun") is None:
        pytest.skip("there is no mpirun")
    pytest.importorskip("mpi4py")
    engine = ("--engine.kind=mpi", f"--engine.schedule={schedule}")
    mpirun = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", str(ranks)]
    succeeded([*mpirun, *command(made.source, tmp_path / "out", *engine)])
    assert left_by(tmp_path / "out") == made.files


@pytest.mark.slow
@pytest.mark.parametrize(("executor", "options"), [("local", "{}"), ("ray", "{mem_per_cpu_gb: 0.5}")])
def test_executors_of_datatrove_leave_the_same_bytes(made: Made, tmp_path: Path, executor: str, options: str) -> None:
    pytest.importorskip("datatrove", reason="needs the extra: pip install 'ingot[datatrove]'")
    if executor == "ray":
        pytest.importorskip("ray", reason="needs the package ray")
    engine = ("--engine.kind=datatrove", f"--engine.executor={executor}", f"--engine.options={options}")
    succeeded(command(made.source, tmp_path / "out", *engine, "--engine.workers=2"))
    assert left_by(tmp_path / "out") == made.files


@pytest.mark.slow
def test_real_stages_stand_among_steps_of_datatrove(made: Made, tmp_path: Path) -> None:
    """Ours, theirs, ours, theirs, ours: what comes out is what our filter leaves of what their filter left."""
    pytest.importorskip("datatrove", reason="needs the extra: pip install 'ingot[datatrove]'")
    from datatrove.executor import LocalPipelineExecutor  # pyright: ignore[reportMissingImports]
    from datatrove.pipeline.filters import LambdaFilter  # pyright: ignore[reportMissingImports]
    from datatrove.pipeline.writers import JsonlWriter  # pyright: ignore[reportMissingImports]

    from llm.crawl.engines.datatrove import Sink, Source, Through

    parts, copies = tmp_path / "parts", tmp_path / "copies"
    tasks = input_tasks(InputConfig(str(made.source)), parts)
    writer = JsonlWriter(str(copies), compression=None)
    steps = [Source(Extract(ExtractConfig()), tasks), LambdaFilter(is_even), Through(Filter(FilterConfig())), writer]
    steps.append(Sink(str(parts)))
    LocalPipelineExecutor(steps, tasks=len(tasks), workers=2, logging_dir=str(tmp_path / "logs")).run()
    kept = {one.id for one in documents_of(made.out / "extract") if is_even(one)}  # filters change the text
    left, found = [one for one in documents_of(made.out / "filter") if one.id in kept], documents_of(parts)
    names = ("id", "text", "url", "source", "offset", "language")
    assert [[getattr(one, name) for name in names] for one in found] == [
        [getattr(one, name) for name in names] for one in left
    ]
    lines = [json.loads(line) for path in sorted(copies.iterdir()) for line in path.read_text().splitlines()]
    assert [(line["id"], line["text"]) for line in lines] == [(str(one.id), one.text) for one in left]
    assert len(left) > 20


def documents_of(folder: Path) -> list[Document]:
    return [one for path in sorted(folder.glob("*.parquet")) for one in read_documents(path)]


def is_even(document) -> bool:
    return len(document.text) % 2 == 0


def succeeded(line: list[str]) -> None:
    result = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=SECONDS)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_killed_in_every_stage_it_goes_on_to_the_same_bytes(made: Made, tmp_path: Path, seed: int) -> None:
    out, chance, kills = tmp_path / "out", random.Random(seed), dict[str, str]()
    line = command(made.source, out, "--engine.workers=2")
    for stage in STAGES:
        before = reports(out)
        process = subprocess.Popen(
            line, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
        )
        family = list[psutil.Process]()
        try:
            if wait_for_work(process, out / stage):
                time.sleep(chance.choice([0, 0, chance.uniform(0, 0.3)]))
                kills[stage], family = kill(process, chance)
            code = process.wait(SECONDS)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        _gone, alive = psutil.wait_procs(family, timeout=15)
        assert not alive
        assert code in (0, 2) if kills.get(stage) in (None, "worker") else code == -signal.SIGKILL
        assert before.items() <= reports(out).items()  # no finished task is repeated
        assert left_by(out).items() <= made.files.items() | unfinished(out)
    assert len(kills) >= 5
    succeeded(line)
    assert left_by(out) == made.files


def reports(out: Path) -> dict[Path, int]:
    """When each finished task was finished."""
    return {path: path.stat().st_mtime_ns for path in out.glob("*/[0-9]*.json") if path.stem.isdecimal()}


def unfinished(out: Path) -> set[tuple[str, str]]:
    """What has a temporary name, which the next run removes."""
    return {(name, value) for name, value in left_by(out).items() if ".tmp" in name}


def wait_for_work(process: subprocess.Popen[bytes], folder: Path) -> bool:
    """Whether a run has begun a file in a stage's folder; else it has ended."""

    def files() -> set[str]:
        return set(os.listdir(folder)) - {"settings.json"} if folder.is_dir() else set()

    before, ends = files(), time.monotonic() + SECONDS
    while process.poll() is None and time.monotonic() < ends:
        if files() - before:
            return True
        time.sleep(0.001)
    return False


def kill(process: subprocess.Popen[bytes], chance: random.Random) -> tuple[str, list[psutil.Process]]:
    """Kill the run's first process, all of them, or a worker: which of these, and the run's children."""
    family = psutil.Process(process.pid).children(recursive=True)
    workers = [one for one in family if "spawn_main" in " ".join(one.cmdline())]
    whom = chance.choice(["first", "all", "worker"] if workers else ["first", "all"])
    if whom == "worker":
        chance.choice(workers).kill()
    elif whom == "all":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    return whom, family
