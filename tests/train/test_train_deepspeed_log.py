"""DeepSpeed's log goes to a file of the run; its errors are shown too."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm.train.engines.deepspeed_log import divert

NAME = "DeepSpeed"


@pytest.fixture(autouse=True)
def undisturbed() -> Iterator[None]:
    """DeepSpeed's logger as it was, after the test."""
    logger = logging.getLogger(NAME)
    before = logger.filters[:], logger.handlers[:], logger.level
    yield
    logger.filters[:], logger.handlers[:] = before[:2]
    logger.setLevel(before[2])


def test_warnings_go_to_the_file_and_errors_to_the_terminal_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "deepspeed/rank-3.log"
    divert(tmp_path / "of an earlier run/rank-3.log")
    divert(path)
    logger = logging.getLogger(NAME)
    logger.addHandler(logging.StreamHandler())  # as deepspeed.utils.logging does when it is imported
    logger.setLevel(logging.WARNING)
    logger.warning("no GPU here")
    logger.error("out of memory")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert [line.split("DeepSpeed ")[1] for line in shown.err.splitlines()] == [
        "ERROR test_train_deepspeed_log.py: out of memory"
    ]
    assert [line.split(": ")[-1] for line in path.read_text().splitlines()] == ["no GPU here", "out of memory"]
    assert (tmp_path / "of an earlier run/rank-3.log").read_text() == ""


def test_what_deepspeed_prints_joins_what_it_logs(tmp_path: Path) -> None:
    path = tmp_path / "deepspeed/rank-0.log"
    file = divert(path)
    print("operator built", file=file)
    logging.getLogger(NAME).warning("no GPU here")
    lines = path.read_text().splitlines()
    assert lines[0] == "operator built" and lines[1].endswith("no GPU here")
