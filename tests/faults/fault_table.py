"""The table of faults in docs/reliability.md: which there are, and what tests have measured of each."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from runs import ROOT

PAGE = ROOT / "docs/reliability.md"
BEGIN, END = "<!-- faults: written by `pytest tests --write-table` -->\n", "<!-- end of faults -->\n"
HEAD = """\
| no. | fault | under | noticed after | steps done again | goes on after |
|---|---|---|---|---|---|
"""
# Each must be recorded by a test.
FAULTS = {
    1: "`kill -9` of a rank in a step",
    2: "`kill -9` in a save, between two of its files",
    3: "`kill -9` between a checkpoint's rename and `latest`",
    4: "`kill -9` of every rank, or of the launcher",
    5: "the link between two hosts is cut",
    6: "a host does not come back",
    7: "SIGTERM or SIGUSR1",
    8: "SIGTERM in a save",
    9: "SIGINT",
    10: "the disk is full",
    11: "the disk fails (EIO) or is read-only",
    12: "the newest checkpoint is cut short",
    13: "a bit of the newest checkpoint is flipped",
    14: "a file of the newest checkpoint is missing, or is another step's",
    15: "a rank does not see the newest checkpoint",
    16: "a bit of a token file is flipped",
    17: "a token file is missing",
    18: "losses and gradients of one rank are not finite",
    19: "the loss spikes",
    20: "a rank does not come to a collective",
    21: "a rank hangs (SIGSTOP)",
    22: "the data loader hangs",
    23: "a rank is slow",
    24: "another model, or samples cut otherwise, are asked for",
    25: "other degrees of tensor and data parallelism are asked for",
    26: "a bit of a weight or a moment flips",
    27: "a gradient is computed wrongly, once",
    28: "a rank does not clip",
    29: "another job listens on the port",
    30: "`kill -9` with dropout",
    31: "each start fails at the same step",
    32: "the clock jumps and folders of logs vanish",
    33: "a second job starts in the run's folder",
    34: "a pickle that does harm lies in a checkpoint",
    35: "a hostfile or a config is made to do harm",
}


class Record(NamedTuple):
    """What one test has measured: seconds, and steps."""

    detected: float | None = None
    """From the fault until the run has ended, or a start has refused or gone around it; None: nothing is to notice."""
    lost: float | None = None
    """Steps that the next start makes once more; None: there is no next start."""
    restart: float | None = None
    """From the next start's command until it has loaded its checkpoint."""

    def worst(self, other: Record) -> Record:
        """The largest of each."""
        return Record(
            *(max((v for v in pair if v is not None), default=None) for pair in zip(self, other, strict=True))
        )


def line(number: int, launcher: str, record: Record) -> str:
    detected, restart = ("-" if value is None else f"{value:.1f} s" for value in (record.detected, record.restart))
    lost = "-" if record.lost is None else str(record.lost)
    return f"| {number} | {FAULTS[number]} | `{launcher}` | {detected} | {lost} | {restart} |\n"


def lines_of(text: str) -> dict[tuple[int, str], str]:
    """The table's lines by number and launcher, in their order."""
    body = text.split(BEGIN, 1)[1].split(END, 1)[0].splitlines(keepends=True)[HEAD.count("\n") :]
    cells = ([cell.strip(" `") for cell in found.split("|")] for found in body)
    return {(int(cell[1]), cell[3]): found for cell, found in zip(cells, body, strict=True)}


def write(page: Path, number: int, launcher: str, record: Record) -> None:
    """Put the record in its line of the page, and lines that stand for no fault out."""
    text = page.read_text()
    found = lines_of(text) | {(number, launcher): line(number, launcher, record)}
    kept = "".join(found[key] for key in sorted(found) if key[0] in FAULTS)
    before, rest = text.split(BEGIN, 1)
    page.write_text(f"{before}{BEGIN}{HEAD}{kept}{END}{rest.split(END, 1)[1]}")


def recorded(source: str) -> Iterator[int]:
    """The numbers in the marks `row` of tests that take the fixture `row`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and "row" in [argument.arg for argument in node.args.args]:
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.row":
                    yield from (ast.literal_eval(number) for number in mark.args)
