"""What a run found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class Finding(NamedTuple):
    """A named fault.

    kind: such as race, deadlock, bounds; text: what happened; line: "file:number" of the kernel; source: that line.
    """

    kind: str
    text: str
    line: str
    source: str

    def __str__(self) -> str:
        return f"{self.kind} at {self.line}: {self.text} | {self.source}"


class Event(NamedTuple):
    """Something that took time: times in clocks by the assumed costs of `trace.Costs`.

    kind: copy, product, wait, exponentials or arithmetic; label: the shared memory or barrier; of: a copy's source, or
    a product's left operand.
    """

    cta: int
    lane: str
    kind: str
    label: str
    start: float
    end: float
    line: str
    of: str = ""


@dataclass
class Report:
    findings: list[Finding] = field(default_factory=list)
    """Each once, in the order in which they came up."""
    steps: int = 0
    trace: list[Event] = field(default_factory=list)

    @property
    def kinds(self) -> set[str]:
        return {finding.kind for finding in self.findings}

    def __str__(self) -> str:
        return "\n".join(map(str, self.findings)) or f"no findings in {self.steps} steps"
