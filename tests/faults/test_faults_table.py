"""The table of faults: a test records each, and a record takes its line."""

from __future__ import annotations

from pathlib import Path

import fault_table as table
from runs import ROOT


def test_a_test_records_each_fault() -> None:
    marked = {number for path in (ROOT / "tests").rglob("test_*.py") for number in table.recorded(path.read_text())}
    assert marked == set(table.FAULTS)


def test_each_line_is_of_a_fault() -> None:
    assert {number for number, _ in table.lines_of(table.PAGE.read_text())} == set(table.FAULTS)


def test_what_counts_as_a_record() -> None:
    source = "@pytest.mark.slow\n@pytest.mark.row(2, 3)\ndef test_a({}): ..."
    assert list(table.recorded(source.format("space, row"))) == [2, 3]
    assert list(table.recorded(source.format("space"))) == []


def test_a_record_takes_its_line_and_no_other(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{table.BEGIN}{table.HEAD}| 999 | no fault | `python` | - | - | - |\n{table.END}after\n")
    for number, launcher, seconds in ((12, "torchrun", 1), (3, "torchrun", 2), (3, "python", 3), (12, "torchrun", 4)):
        table.write(page, number, launcher, table.Record(seconds, None, 0.25))
    assert page.read_text() == (
        f"before\n{table.BEGIN}{table.HEAD}"
        f"| 3 | {table.FAULTS[3]} | `python` | 3.0 s | - | 0.2 s |\n"
        f"| 3 | {table.FAULTS[3]} | `torchrun` | 2.0 s | - | 0.2 s |\n"
        f"| 12 | {table.FAULTS[12]} | `torchrun` | 4.0 s | - | 0.2 s |\n"
        f"{table.END}after\n"
    )


def test_the_worst_is_recorded() -> None:
    one, other = table.Record(1, None, None), table.Record(None, 5, None)
    assert one.worst(other) == other.worst(one) == table.Record(1, 5, None)
    assert table.Record(2, 3, 4).worst(table.Record(1, 5, 3)) == table.Record(2, 5, 4)
