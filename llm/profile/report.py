"""The report of a profile: report.json and report.html beside the records that it is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from llm import files
from llm.errors import CheckpointError, InputError, require
from llm.profile.bottlenecks import (
    Records,
    bottlenecks,
    overhead_ms,
    part_ms,
    part_names,
    part_of,
    ratio,
    roofline_ms,
    step_ms,
    usual,
)
from llm.profile.page import render
from llm.profile.record import Record
from llm.sinks import Say


def write_report(folder: Path, say: Say = print) -> dict[str, Any]:
    """Write report.json and report.html of the records in `folder`, say what slows the step, and return the content.

    Raises InputError where the records are not those of one profile, ReadError where they cannot be read.
    """
    content = summary(load_profile(folder))
    files.write_json(folder / "report.json", content)
    with files.complete_file(folder / "report.html") as file:
        file.write(render(content).encode())
    step, overhead = content["step_ms"], content["overhead"]
    say(f"a step takes {step:.1f} ms, {overhead:.0%} of it the profiler's; what slows it most:")
    for place, found in enumerate(content["bottlenecks"], 1):
        say(f"{place:3}. {found['name']}: {found['where']}. Gain up to {found['gain_ms']:.1f} ms, {found['share']:.0%}")
        say(f"     {found['advice']}")
    say(f"{folder / 'report.html'} shows the rest")
    return content


def load_profile(folder: Path) -> list[Record]:
    """The records of all ranks, by rank. Raises InputError unless they are of one profile, ReadError."""
    try:
        records = [Record.load(path) for path in folder.glob("rank-*.json")]
    except CheckpointError as error:
        raise InputError(f"{folder} holds no profile: {error}") from error
    require(bool(records), f"{folder} holds no profile: found no rank-*.json; expected what profile_step.py writes")
    records.sort(key=lambda record: record.rank)
    found, world = [record.rank for record in records], records[0].world
    require(found == [*range(world)], f"{folder} holds ranks {found}; expected all {world}: profile the run again")
    require(
        len({(record.world, record.steps, record.device) for record in records}) == 1,
        f"{folder} holds records of several profiles (worlds, steps or devices differ); profile into an empty folder",
    )
    return records


def summary(records: Records) -> dict[str, Any]:
    """What the report says, as JSON can hold it. Times and counts are per step and means over the ranks."""

    def mean(measure: Callable[[Record], float]) -> float:
        return fmean(map(measure, records))

    first, step = records[0], step_ms(records)
    peak = max(records, key=lambda record: record.memory.peak_bytes)
    return {
        "device": first.device,
        "world": first.world,
        "layout": first.layout,
        "steps": list(first.steps),
        "tokens_per_step": first.tokens_per_step.world,
        "step_ms": step,
        "unprofiled_step_ms": max(record.unprofiled_step_ms for record in records),
        "overhead": ratio(mean(overhead_ms), mean(lambda record: record.step_ms)),
        "machine": dataclasses.asdict(first.machine),
        "parts": [part_row(records, name, mean) for name in part_names(records)],
        "unattributed_ms": mean(lambda record: record.unattributed_ms),
        "collectives": collective_rows(records),
        "host": {key: mean(lambda r, k=key: getattr(r.host_time, k)) for key in ("launches", "gap_ms", "python_ms")},
        "loader_wait_ms": mean(lambda record: record.loader.wait_ms),
        "syncs": [dataclasses.asdict(sync) for sync in first.syncs],
        "ops": [dataclasses.asdict(op) for op in first.ops],
        "ranks": [
            {
                "rank": record.rank,
                "host": record.host,
                "busy_ms": fmean(record.busy_ms),
                "collectives_ms": sum(collective.exposed_ms for collective in record.collectives),
                "loader_ms": record.loader.wait_ms,
            }
            for record in records
        ],
        "memory": {"rank": peak.rank} | dataclasses.asdict(peak.memory),
        "bottlenecks": [found._asdict() for found in bottlenecks(records)],
    }


def part_row(records: Records, name: str, mean: Callable[[Callable[[Record], float]], float]) -> dict[str, Any]:
    """A line of the table of parts."""
    passes = ("forward_ms", "backward_ms", "recompute_ms", "device_ms", "flops", "bytes")
    row: dict[str, Any] = {"name": name}
    row |= {key: mean(lambda record, key=key: getattr(part_of(record, name), key)) for key in passes}
    ms, least = mean(lambda record: part_ms(record, name)), mean(lambda record: roofline_ms(record, name))
    slowest = max(records, key=lambda record: part_ms(record, name))
    excess = part_ms(slowest, name) - usual(records, lambda record: part_ms(record, name))
    row |= {"ms": ms, "share": ratio(ms, mean(lambda record: record.step_ms)), "of_roofline": ratio(least, ms)}
    return row | {"slowest_rank": slowest.rank, "excess_ms": excess}


def collective_rows(records: Records) -> list[dict[str, Any]]:
    """The table of collectives: means over the ranks that take part, and the least exposed time of one of them."""
    kinds = dict.fromkeys((c.name, c.group_size) for record in records for c in record.collectives)
    rows = []
    for name, group_size in kinds:
        found = [c for record in records for c in record.collectives if (c.name, c.group_size) == (name, group_size)]
        row = {"name": name, "group_size": group_size, "least_exposed_ms": min(c.exposed_ms for c in found)}
        row |= {key: fmean(getattr(c, key) for c in found) for key in ("count", "ms", "exposed_ms", "bytes")}
        rows.append(row | {"hidden_ms": row["ms"] - row["exposed_ms"]})
    return rows
