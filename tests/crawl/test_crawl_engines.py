"""The same bytes on any engine; a process that dies names its task; nothing half-written, nothing left running."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from toy_stages import content, run_toys, slow_toys, toys, write_input

from llm.crawl.engines.local import Local
from llm.crawl.engines.worker import Given
from llm.crawl.tasks import Task
from llm.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """An input, and what one process makes of it."""
    folder = tmp_path_factory.mktemp("engines")
    source = write_input(folder / "in")
    run_toys(source, folder / "out", Local(toys, 1))
    return source, content(folder / "out")


@pytest.mark.parametrize("workers", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_workers_leaves_the_same_bytes(expected, tmp_path: Path, workers: int) -> None:
    source, found = expected
    with Local(toys, workers) as engine:
        run_toys(source, tmp_path / "out", engine)
        assert len(engine._processes) == workers
    assert content(tmp_path / "out") == found
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("order", "error", "message"),
    [
        ("die", InputError, r"lines task 3 \(3.txt\): its process was killed by SIGKILL \(.* memory\); run the same"),
        pytest.param("fail", InputError, r"lines task 3 \(3.txt\): the order was to fail$", marks=pytest.mark.slow),
        pytest.param(
            "defect", RuntimeError, r"lines task 3 \(3.txt\) failed:\n(.|\n)*KeyError", marks=pytest.mark.slow
        ),
    ],
)
def test_what_ends_a_worker_names_its_task(tmp_path: Path, order: str, error: type[Exception], message: str) -> None:
    source, out = write_input(tmp_path / "in"), tmp_path / "out"
    with (source / "3.txt").open("a") as file:
        file.write(f"\n!{order}\nafter")
    with Local(toys, 2) as engine:
        with pytest.raises(error, match=message):
            run_toys(source, out, engine)
        assert not multiprocessing.active_children()
        assert not list(out.glob("*/.*")) and not (out / "lines/00003.parquet").exists()
        run_toys(source, out, engine)  # what it did is done only once
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / f"{order}.done").touch()
    run_toys(source, alone, Local(toys, 1))
    assert content(out) == content(alone)


def test_one_process_names_the_task_that_fails(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in", files=2)
    (source / "1.txt").write_text("!fail")
    with pytest.raises(InputError, match=r"lines task 1 \(1.txt\): the order was to fail"):
        run_toys(source, tmp_path / "out", Local(toys, 1))


def test_a_process_that_died_between_two_stages_is_noticed(expected, tmp_path: Path) -> None:
    with Local(toys, 2) as engine:
        run_toys(expected[0], tmp_path / "one", engine)
        for process in engine._processes.values():
            process.kill()
            process.join()
        with pytest.raises(InputError, match=r"lines task \d .*: its process was killed by SIGKILL"):
            run_toys(expected[0], tmp_path / "other", engine)


def test_a_single_task_starts_no_process(tmp_path: Path) -> None:
    with Local(toys, 2) as engine:
        run_toys(write_input(tmp_path / "in", files=1), tmp_path / "out", engine)
        assert not engine._processes


def test_a_task_is_never_shown_as_more_than_its_bytes(tmp_path: Path) -> None:
    told = list[int]()
    given = Given("lines", told.append)
    for worker in (0, 1):
        given.give(worker, Task(worker, (), tmp_path, size=10))
    given.heard(0, b'{"done": 12}')
    given.heard(1, b'{"done": 4}')
    assert given.heard(0, b'{"finished": true}')
    assert told == [10, 14, 14]


def test_progress_rises_to_all_bytes(expected, tmp_path: Path) -> None:
    from toy_stages import LINKS

    from llm.crawl.chain import tasks_of
    from llm.crawl.restart import run_stage
    from llm.crawl.settings import CorpusConfig, InputConfig

    tasks, told = tasks_of(CorpusConfig(str(tmp_path), InputConfig(str(expected[0]))), LINKS[0], LINKS), list[int]()
    total = sum(task.size for task in tasks)
    with Local(slow_toys, 2) as engine:
        run_stage("lines", tasks, engine, told.append)
    assert told == sorted(told) and told[0] == 0 and told[-1] == total
    assert len(set(told)) > len(tasks) + 1  # within tasks too
    for number in (0, 1):
        tasks[number].path(".json").unlink()
    told.clear()
    run_stage("lines", tasks, Local(slow_toys, 1), told.append)
    assert told[0] == sum(task.size for task in tasks[2:]) and told[-1] == total


@pytest.mark.slow
def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(expected, tmp_path: Path) -> None:
    source, found = expected
    out, chance, kills = tmp_path / "out", random.Random(18), 0
    command = [sys.executable, str(Path(__file__).with_name("toy_stages.py")), str(source), str(out), "2"]
    while True:
        done = {path: path.stat().st_mtime_ns for path in out.glob("*/[0-9]*.json")}
        begun = (out / "lines/log").read_text().split() if (out / "lines/log").exists() else []
        finished = {path.stem for path in done if path.parent.name == "lines"}
        process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path)
        try:
            code = process.wait(chance.uniform(0.3, 1) * (2 + kills))  # longer each time: a machine may be slow
        except subprocess.TimeoutExpired:
            children = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            _gone, alive = psutil.wait_procs(children, timeout=15)
            assert not alive
        else:
            assert code == 0
            break
        finally:
            again = (out / "lines/log").read_text().split()[len(begun) :] if (out / "lines/log").exists() else []
            assert not finished & {f"{int(number):05d}" for number in again}
            now = {path: path.stat().st_mtime_ns for path in out.glob("*/[0-9]*.json")}
            assert done.items() <= now.items()
    assert kills >= 2
    assert content(out) == found_with_pause(found, tmp_path, source)


@pytest.mark.slow
def test_what_a_terminal_interrupts_is_told_once(expected, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, str(Path(__file__).with_name("toy_stages.py")), str(expected[0]), str(out), "2"]
    process = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while process.poll() is None and not (out / "lines/log").exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
    _, errors = process.communicate(timeout=60)
    assert process.returncode and errors.count("Traceback") == 1
    assert not list(out.glob("*/.*"))


def found_with_pause(found: dict[str, str], folder: Path, source: Path) -> dict[str, str]:
    """What slow_toys leave, whose settings are in their reports: the parts are the same."""
    run_toys(source, folder / "alone", Local(slow_toys, 1))
    slow = content(folder / "alone")
    assert {name: value for name, value in slow.items() if "json" not in name} == {
        name: value for name, value in found.items() if "json" not in name
    }
    return slow
