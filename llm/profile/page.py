"""Draws a report as one HTML page that needs nothing else: no script, no font and no picture from anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from llm.page import COLOURS, WIDTH, bars, document, in_bytes, number, percent, svg, table, text

PASSES = ("forward", "backward", "recompute")


def render(report: dict[str, Any]) -> str:
    """The page of a report (llm/profile/report.py: `summary`)."""
    layout = ", ".join(f"{key} {value}" for key, value in report["layout"].items())
    first, last = report["steps"]
    machine = report["machine"]
    sections = [
        f"<p>{number(report['step_ms'])} ms a step, {number(report['tokens_per_step'])} tokens; {report['world']} "
        f"ranks on {escape(report['device'])}; steps {first} to {last}; {escape(layout)}.</p>",
        f"<p>Without the profiler a step takes {number(report['unprofiled_step_ms'])} ms: its overhead is "
        f"{percent(report['overhead'])}. This machine multiplies matrices at {number(machine['matmul_tflops'])} "
        f"TFLOP/s and copies at {number(machine['copy_gbs'])} GB/s.</p>",
        "<h2>What slows the step</h2>" + findings(report),
        "<h2>Time by part</h2>" + parts_chart(report) + parts(report),
        "<h2>Ranks</h2>" + ranks_chart(report),
        "<h2>Collectives</h2>" + collectives(report),
        "<h2>The host</h2>" + host(report),
        "<h2>Memory</h2>" + memory_chart(report) + peak_chart(report) + memory(report),
    ]
    return document("Profile of a step", "\n".join(sections))


def findings(report: dict[str, Any]) -> str:
    rows = [
        (i, f["name"], f["where"], number(f["ms"]), f"{number(f['gain_ms'])} ({percent(f['share'])})", f["advice"])
        for i, f in enumerate(report["bottlenecks"], 1)
    ]
    note = "<p>A gain is the most that a change can save of this step, if nothing else changes; gains overlap.</p>"
    return table(("", "bottleneck", "where", "ms now", "gain, ms", "what would remove it"), rows) + note


def parts(report: dict[str, Any]) -> str:
    head = (*("part", *PASSES, "device", "ms", "of the step", "GFLOP", "bytes"), "of the roofline", "slowest rank")
    rows: list[Sequence[Any]] = [
        (
            *(part["name"], *(number(part[f"{name}_ms"]) for name in (*PASSES, "device")), number(part["ms"])),
            *(percent(part["share"]), number(part["flops"] / 1e9), in_bytes(part["bytes"])),
            *(percent(part["of_roofline"]), f"{part['slowest_rank']} (+{number(part['excess_ms'])})"),
        )
        for part in report["parts"]
    ]
    return table(head, [*rows, ("unattributed", "", "", "", "", number(report["unattributed_ms"]))])


def collectives(report: dict[str, Any]) -> str:
    rows = [
        (
            *(c["name"], c["group_size"], number(c["count"]), in_bytes(c["bytes"])),
            *(number(c[key]) for key in ("ms", "exposed_ms", "hidden_ms", "least_exposed_ms")),
        )
        for c in report["collectives"]
    ]
    return table(("collective", "ranks", "count", "bytes", "ms", "exposed", "hidden", "least exposed"), rows)


def host(report: dict[str, Any]) -> str:
    host = report["host"]
    text = (
        f"<p>{number(host['launches'])} launches a step; nothing is computed for {number(host['gap_ms'])} ms; Python "
        f"alone takes {number(host['python_ms'])} ms; the loader is waited for "
        f"{number(report['loader_wait_ms'])} ms.</p>"
    )
    syncs = [(sync["where"], number(sync["count"]), number(sync["ms"])) for sync in report["syncs"]]
    ops = [(op["name"], op["part"], number(op["count"]), number(op["ms"])) for op in report["ops"]]
    return text + table(("the host waits in", "count", "ms"), syncs) + table(("operation", "part", "count", "ms"), ops)


def memory(report: dict[str, Any]) -> str:
    found = report["memory"]
    kinds = [(name, in_bytes(size)) for name, size in found["categories"].items()]
    kinds += [("unattributed", in_bytes(found["unattributed_bytes"]))]
    owners = [(owner["name"], in_bytes(owner["bytes"])) for owner in found["owners"]]
    return table(("at the peak", "bytes"), kinds) + table(("owner", "bytes"), owners)


def parts_chart(report: dict[str, Any]) -> str:
    rows = [(part["name"], [part[f"{name}_ms"] for name in PASSES]) for part in report["parts"]]
    return bars([*rows, ("unattributed", [report["unattributed_ms"]])], PASSES, "ms")


def ranks_chart(report: dict[str, Any]) -> str:
    kinds = ("busy", "collectives", "loader")
    rows = [(f"rank {r['rank']} {r['host']}", [r[f"{kind}_ms"] for kind in kinds]) for r in report["ranks"]]
    return bars(rows, ("busy", "exposed collectives", "waits for the loader"), "ms")


def memory_chart(report: dict[str, Any], height: int = 160) -> str:
    """Live bytes over the step."""
    found = report["memory"]
    points = found["over_step"]
    longest, most = max((ms for ms, _ in points), default=0) or 1, max((size for _, size in points), default=0) or 1
    line = " ".join(f"{ms / longest * WIDTH:.1f},{height - size / most * (height - 20):.1f}" for ms, size in points)
    curve = f'<polygon class="c0" points="0,{height} {line} {WIDTH},{height}" fill="{COLOURS[0]}" fill-opacity="0.3"/>'
    curve += text(4, 13, f"{in_bytes(most)} at most over {number(longest)} ms of rank {found['rank']}")
    return svg(height, curve)


def peak_chart(report: dict[str, Any]) -> str:
    """The peak by category."""
    found = report["memory"]
    kinds = [*found["categories"].items(), ("unattributed", found["unattributed_bytes"])]
    return bars([(name, [size / 1e6]) for name, size in kinds], (), "MB")
