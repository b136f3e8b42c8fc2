"""Fixes, before anything imports torch or triton, how the tests' kernels run: interpreted, but on a
GPU run compiled.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from pool import RankPool


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr.strip() == "gpu":  # `make test-gpu`
        return
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


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
