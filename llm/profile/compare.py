"""What changed between two profiles."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm.page import in_bytes
from llm.profile.bottlenecks import ratio
from llm.profile.report import load_profile, summary
from llm.sinks import Say


def compare(a: Path, b: Path, say: Say = print) -> None:
    """Say what changed from the profile in folder `a` to that in `b`: the layout, the step, its parts and its memory.

    Raises InputError where a folder holds no profile, ReadError where it cannot be read.
    """
    before, after = summary(load_profile(a)), summary(load_profile(b))
    for line in differences(before, after):
        say(line)


def differences(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """The lines that compare two reports; times and bytes are those of a step."""
    for key in sorted({*before["layout"], *after["layout"]}):
        old, new = before["layout"].get(key, "none"), after["layout"].get(key, "none")
        if old != new:
            yield f"{key}: {old} -> {new}"
    for key in ("device", "world", "tokens_per_step"):
        if before[key] != after[key]:
            yield f"{key}: {before[key]} -> {after[key]}"
    yield f"{'':28}{'A, ms':>10}{'B, ms':>10}{'change':>10}{'':>9}"
    yield change("step", before["step_ms"], after["step_ms"])
    yield change("step without the profiler", before["unprofiled_step_ms"], after["unprofiled_step_ms"])
    thousands = [ratio(report["unprofiled_step_ms"] * 1000, report["tokens_per_step"]) for report in (before, after)]
    yield change("for 1000 tokens", *thousands)
    yield from table("", [{row["name"]: row["ms"] for row in report["parts"]} for report in (before, after)])
    yield change("unattributed", before["unattributed_ms"], after["unattributed_ms"])
    yield change("waits for the loader", before["loader_wait_ms"], after["loader_wait_ms"])
    exposed = [{exposed_name(row): row["exposed_ms"] for row in report["collectives"]} for report in (before, after)]
    yield from table("exposed ", exposed)
    kinds = [{"peak": report["memory"]["peak_bytes"]} | report["memory"]["categories"] for report in (before, after)]
    for name in dict.fromkeys([*kinds[0], *kinds[1]]):
        old, new = (kind.get(name, 0) for kind in kinds)
        yield f"memory: {name:20}{in_bytes(old):>10}{in_bytes(new):>10}{ratio(new - old, old):>+19.1%}"


def exposed_name(row: dict[str, Any]) -> str:
    return f"{row['name']} of {row['group_size']}"


def table(prefix: str, times: list[dict[str, float]]) -> list[str]:
    """A line for each name of either side, the largest change first."""
    names = dict.fromkeys([*times[0], *times[1]])
    rows = [(prefix + name, times[0].get(name, 0.0), times[1].get(name, 0.0)) for name in names]
    return [change(*row) for row in sorted(rows, key=lambda row: -abs(row[2] - row[1]))]


def change(name: str, old: float, new: float) -> str:
    relative = f"{ratio(new - old, old):>+9.1%}" if old else f"{'new':>9}" if new else f"{'':>9}"
    return f"{name[:28]:28}{old:>10.2f}{new:>10.2f}{new - old:>+10.2f}{relative}"
