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

from llm.crawl.chain import CHAIN, main

SECONDS = 300  # that a chain may take, at most


def test_the_small_crawl_has_something_for_every_stage(made: Made) -> None:
    assert tuple(link.stage for link in CHAIN) == STAGES
    reports = {stage: [json.loads(path.read_text()) for path in (made.out / stage).glob("0*[0-9].json")] for stage in STAGES}
    assert [len(reports[stage]) for stage in STAGES] == [7, 7, 7, 1, 7, 1, 7, 1]
    removed = {reason for found in reports.values() for report in found for reason in report["removed"]}
    assert removed >= {"extract.status", "language.fr", "dedup.exact", "dedup.near"}
    assert sum(report["damage_count"] for report in reports["extract"]) == 3
    assert reports["tokens"][0]["documents_out"] > 30


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
                kills[stage] = chance.choice(["first", "all", "worker"])
                family = kill(process, kills[stage], chance)
            code = process.wait(SECONDS)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        _gone, alive = psutil.wait_procs(family, timeout=15)
        assert not alive
        assert code in ((-signal.SIGKILL,) if kills.get(stage) in ("first", "all") else (0, 2))
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


def kill(process: subprocess.Popen[bytes], whom: str, chance: random.Random) -> list[psutil.Process]:
    """Kill the run's first process, all of them, or a worker; the run's children."""
    family = psutil.Process(process.pid).children(recursive=True)
    workers = [one for one in family if "spawn_main" in " ".join(one.cmdline())]
    if whom == "worker" and workers:
        chance.choice(workers).kill()
    elif whom == "all":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    return family
