"""The benchmarks' report form: records are kept line by line, tables and plots are made of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from benchmarks.report import Curve, Panel, append, begin, header, heading, number, plot, read, spread, table


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    head = header("benchmarks.x", ["--only", "a b"], torch.device("cpu"), ["torch"])
    assert head["command"] == "python -m benchmarks.x --only 'a b'"
    path = tmp_path / "new/results.jsonl"
    begin(path, head)
    for n in range(2):
        append(path, {"n": n})
    assert read(path) == (head, [{"n": 0}, {"n": 1}])
    assert len(path.read_text().splitlines()) == 3
    begin(path, head)
    assert read(path) == (head, [])


@pytest.mark.parametrize("text", ["", "{}", '{"run": {}}\n{"broken'])
def test_a_damaged_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.jsonl").write_text(text)
    with pytest.raises((ValueError, KeyError)):
        read(tmp_path / "r.jsonl")


def test_the_heading_says_what_a_run_was_made_on() -> None:
    head = {"date": "2026-01-01T00:00", "cpu": "CPU", "cores": 2, "memory_gb": 8, "gpu": None, "system": "Linux-6"}
    head |= {"python": "3", "packages": {"torch": "2", "triton": "4"}, "command": "c", "load": 0.25}
    tail = "Linux-6, Python 3, torch 2, triton 4, `c`. Load average before the run: 0.2."
    assert heading(head) == f"2026-01-01, 2 cores of CPU, 8 GB, {tail}"
    assert heading(head | {"gpu": "GPU"}) == f"2026-01-01, GPU, {tail}"


def test_numbers_have_three_figures_or_are_whole() -> None:
    assert [number(x) for x in (1234.5, 99.96, 99.94, 0.01234)] == ["1,234", "100", "99.9", "0.0123"]
    assert spread([]) == "–"  # noqa: RUF001
    assert spread([3e6], 1e-6) == "3"
    assert spread([5.0, 1.0, 2.0, 3.0, 4.0]) == "3 (2 to 4)"


def test_a_table_is_markdown() -> None:
    assert table(["a", "b"], [["1", "2"]]) == ["| a | b |", "|---|---|", "| 1 | 2 |"]


@pytest.mark.parametrize(("count", "shape"), [(1, (450, 700)), (2, (450, 1400)), (3, (900, 1400))])
def test_panels_stand_two_in_a_row(tmp_path: Path, count: int, shape: tuple[int, int]) -> None:
    curves = [Curve("ours", [(1, 2.0), (2, 3.0)], "ours"), Curve("copy", [(1, 4.0), (2, 4.0)], "reference")]
    panels = [Panel("t", "x", "y", curves, [(1, "1"), (2, "2")], log_y=True), Panel("t", "", "y", [], [], log_x=False)]
    plot(tmp_path / "p.png", (panels * 2)[:count])
    assert imread(tmp_path / "p.png").shape[:2] == shape
