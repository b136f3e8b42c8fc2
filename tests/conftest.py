"""Fixes, before anything imports torch or triton, how the tests' kernels run: interpreted, but on a
GPU run compiled.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import pytest

import fault_table
from chosen import is_chosen, selects_only_gpu
from pool import RankPool
from runs import Workspace, succeeded


def pytest_configure(config: pytest.Config) -> None:
    # Ignored where pytest was started in a shell's background, and then by every run that a test starts and stops.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if selects_only_gpu(config.option.markexpr):
        return
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--one-in", type=int, default=1, help="run one in so many of the selected tests")
    parser.addoption("--chosen-by", default="", help="a text, such as a commit's hash, that says which ones")
    parser.addoption("--fuzz-seconds", help="run fuzzers so long, and fail where libFuzzer cannot be run (make fuzz)")
    parser.addoption("--fuzz-seed", type=int, help="the Gluon kernels' first case; else the time chooses it")
    parser.addoption("--write-table", action="store_true", help="write what faults cost into docs/reliability.md")


RANK_FIXTURES = {"one_rank", "two_ranks", "four_ranks", "workspace"}


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests that start several ranks: `make test` runs the others side by side, these one at a time."""
    for item in items:
        if RANK_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker("ranks")
    one_in, chosen_by = config.option.one_in, config.option.chosen_by
    left_out = [item for item in items if not is_chosen(item.nodeid, chosen_by, one_in)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture(scope="session")
def one_rank() -> Iterator[RankPool]:
    yield from _pool(1)


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    yield from _pool(2)


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[RankPool]:
    yield from _pool(4)


def _pool(world_size: int) -> Iterator[RankPool]:
    pool = RankPool(world_size)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A folder with a prepared corpus, in which real runs are started."""
    space = Workspace(tmp_path_factory.mktemp("workspace"))
    succeeded(space.prepare())
    return space


RECORDS = pytest.StashKey[dict[tuple[int, str], fault_table.Record]]()


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Callable[..., None]:
    """row(12, "torchrun", detected=1.5, lost=4, restart=7.2): what a fault has cost; the worst of all tests counts."""
    numbers = [number for mark in request.node.iter_markers("row") for number in mark.args]
    records = request.config.stash.setdefault(RECORDS, {})

    def record(number: int, launcher: str, **measured: float | None) -> None:
        assert number in numbers, f"the test has no mark row({number})"
        found, key = fault_table.Record(**measured), (number, launcher)
        records[key] = found.worst(records.get(key, found))
        if request.config.option.write_table:
            fault_table.write(fault_table.PAGE, number, launcher, records[key])

    return record


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Deselected tests are only counted by pytest: say what they are and how to run them."""
    expression = config.option.markexpr
    for marker, target in (("slow", "test-all"), ("gpu", "test-gpu"), ("cluster", "test-cluster")):
        if f"not {marker}" in expression:
            terminalreporter.write_line(f"not run here: tests marked `{marker}` (make {target})")
