"""Joins the ranks' traces to one timeline for Perfetto: a process per rank, its clocks aligned at a barrier."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm import files
from llm.profile.ranges import PREFIX

ALIGN = "align"
"""The range of the barrier before the first profiled step: all ranks leave it at the same time."""


def trace_path(folder: Path, rank: int) -> Path:
    return folder / f"trace-rank-{rank}.json.gz"


def join_traces(folder: Path, hosts: Sequence[str]) -> Path:
    """Write timeline.json.gz of the traces of as many ranks as `hosts`, one after the other; returns its path."""
    path, separator = folder / "timeline.json.gz", '{"traceEvents": ['
    with files.complete_file(path) as target, gzip.open(target, "wt", encoding="utf-8", compresslevel=3) as out:
        for rank, host in enumerate(hosts):
            for event in _events(trace_path(folder, rank), rank, host, len(hosts)):
                out.write(separator + json.dumps(event))
                separator = ",\n"
        out.write('], "displayTimeUnit": "ms"}')
    return path


def _events(path: Path, rank: int, host: str, world: int) -> list[dict[str, Any]]:
    """A rank's events, in microseconds since the barrier."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    marks = [event for event in events if event["name"] == PREFIX + ALIGN and event["ph"] == "X"]
    zero = marks[0]["ts"] + marks[0]["dur"] if marks else min(event["ts"] for event in events if "ts" in event)
    name = {"ph": "M", "name": "process_name", "pid": rank, "tid": 0, "args": {"name": f"rank {rank} on {host}"}}
    order = {"ph": "M", "name": "process_sort_index", "pid": rank, "tid": 0, "args": {"sort_index": rank}}
    kept = [name, order]
    for event in events:
        if event["name"].startswith("process_") or event["name"] == "[memory]" or event.get("cat") == "Trace":
            continue  # ours are above; the profiler's own span would hide the steps
        event = event | {"pid": rank}
        if "ts" in event:
            event["ts"] = round(event["ts"] - zero, 3)
        if "id" in event:
            event["id"] = event["id"] * world + rank  # arrows join events of one rank
        kept.append(event)
    return kept
