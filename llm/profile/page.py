"""Draws a report as one HTML page that needs nothing else: no script, no font and no picture from anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from llm.profile.bottlenecks import in_bytes

COLOURS = ("#0969da", "#bf8700", "#cf222e", "#8250df", "#1a7f37", "#6e7781")
WIDTH, LABEL, BAR = 760, 150, 20  # pixels: of a chart, of its labels, of a bar's height
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
    return PAGE.format(body="\n".join(sections))


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
    curve = f'<polygon points="0,{height} {line} {WIDTH},{height}" fill="{COLOURS[0]}" fill-opacity="0.3"/>'
    curve += text(4, 13, f"{in_bytes(most)} at most over {number(longest)} ms of rank {found['rank']}")
    return svg(height, curve)


def peak_chart(report: dict[str, Any]) -> str:
    """The peak by category."""
    found = report["memory"]
    kinds = [*found["categories"].items(), ("unattributed", found["unattributed_bytes"])]
    return bars([(name, [size / 1e6]) for name, size in kinds], (), "MB")


def bars(rows: Sequence[tuple[str, Sequence[float]]], legend: Sequence[str], unit: str) -> str:
    """A horizontal bar for each row, in a colour for each of its values; as SVG."""
    longest = max((sum(values) for _, values in rows), default=0) or 1
    top, shapes = BAR if legend else 0, []
    for i, name in enumerate(legend):
        shapes.append(f'<rect x="{LABEL + 160 * i}" y="3" width="12" height="12" fill="{COLOURS[i]}"/>')
        shapes.append(text(LABEL + 160 * i + 17, 13, name))
    for i, (name, values) in enumerate(rows):
        x, y = float(LABEL), top + i * BAR
        shapes.append(text(0, y + 14, name[:24]))
        for colour, value in zip(COLOURS, values, strict=False):
            width = max(0.0, value) / longest * (WIDTH - LABEL - 90)
            shapes.append(f'<rect x="{x:.1f}" y="{y + 3}" width="{width:.1f}" height="{BAR - 5}" fill="{colour}"/>')
            x += width
        shapes.append(text(x + 5, y + 14, f"{number(sum(values))} {unit}"))
    return svg(top + len(rows) * BAR, "".join(shapes))


def svg(height: float, shapes: str) -> str:
    size = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} style="background:white" font-family="sans-serif" '
        f'font-size="12">{shapes}</svg>'
    )


def text(x: float, y: float, words: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}">{escape(words)}</text>'


def table(head: Iterable[str], rows: Sequence[Iterable[Any]]) -> str:
    """An HTML table; every cell is escaped."""
    if not rows:
        return "<p>None.</p>"
    lines = ["".join(f"<th>{escape(name)}</th>" for name in head)]
    lines += ["".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>\n" for line in lines) + "</table>"


def number(value: float) -> str:
    """Three digits, and thousands apart."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percent(share: float) -> str:
    return f"{share:.1%}"


PAGE = """\
<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Profile of a step</title>
<style>
body {{ font: 14px sans-serif; max-width: 1100px; margin: 2em auto; color: #24292f; background: white; }}
table {{ border-collapse: collapse; margin: 1em 0; }}
th, td {{ border-bottom: 1px solid #d0d7de; padding: 3px 10px; text-align: left; vertical-align: top; }}
</style></head><body>
<h1>Profile of a step</h1>
{body}
</body></html>
"""
