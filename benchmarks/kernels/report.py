"""The results of benchmarks.kernels as Markdown tables and plots."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Case = dict[str, Any]
NONE = "–"  # noqa: RUF001


def panels(cases: list[Case]) -> list[list[Case]]:
    """The cases that share a table and a panel: one kernel, group, part and dtype, in order of appearance."""
    found: dict[tuple[str, ...], list[Case]] = {}
    for case in cases:
        found.setdefault(tuple(case[key] for key in ("kernel", "group", "part", "dtype")), []).append(case)
    return list(found.values())


def unit(panel: list[Case], limits: dict[str, float]) -> tuple[str, str, str, float]:
    """(key, unit, limit's name, limit) of the rate to give: that of what takes longer at the machine's limits."""
    moving = sum(case["bytes"] for case in panel) / 1e9 / limits["copy_gb_s"]
    computing = sum(case["flops"] for case in panel) / 1e12 / limits["matmul_tflop_s"]
    if computing > moving:
        return "tflop_s", "TFLOP/s", "matmul", limits["matmul_tflop_s"]
    return "gb_s", "GB/s", "copy", limits["copy_gb_s"]


def timed(panel: list[Case]) -> list[str]:
    """The rivals with a time in any of the panel's cases, ours first, else in order of appearance."""
    names = dict.fromkeys(name for case in panel for name, record in case["rivals"].items() if "ms" in record)
    return sorted(names, key=lambda name: not name.startswith("ingot"))


def table(results: dict[str, Any]) -> str:
    """A heading with the machine, then a table per panel with notes under it."""
    machine, limits = results["machine"], results["limits"]
    lines = [
        f"{results['date'][:10]}, {machine['device']}, Python {machine['python']}, "
        + ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
        + f", `{results['command']}`.",
        f"Copy {limits['copy_gb_s']:,.0f} GB/s, matmul {limits['matmul_tflop_s']:.3g} TFLOP/s in the same run. "
        f"Timed by {results['method']}.",
        "*ms* is ours, median (20th to 80th percentile); *host* what queuing it takes the CPU; *ratio* the best "
        "other's time over ours.",
    ]
    for panel in panels(results["cases"]):
        lines += ["", *panel_lines(panel, limits)]
    absent = {name for case in results["cases"] for name, record in case["rivals"].items() if missing(record)}
    if absent:
        lines += ["", f"Not installed: {', '.join(sorted(absent))} (results.json says what each needs)."]
    return "\n".join(lines) + "\n"


def panel_lines(panel: list[Case], limits: dict[str, float]) -> list[str]:
    key, name, limit_name, limit = unit(panel, limits)
    rivals = timed(panel)
    first = panel[0]
    title = " ".join(filter(None, [first["kernel"], first["part"], first["group"], first["dtype"]]))
    head = ["shape", "ms", "host ms", f"of {limit_name}", *rivals, "best other", "ratio"]
    lines = [f"### {title}, {name}", "", row(head), "|---" * len(head) + "|"]
    for case in panel:
        ours = case["rivals"]["ingot"]
        times = [NONE] * 3
        if "ms" in ours:
            spread = f"{ours['ms']:.4g} ({ours['ms_p20']:.4g} to {ours['ms_p80']:.4g})"
            times = [spread, f"{ours['host_ms']:.3g}", f"{ours[key] / limit:.0%}"]
        rates = [rate(case["rivals"].get(rival, {}), key) for rival in rivals]
        ratio = f"{case['ratio']:.2f}" if case["ratio"] else NONE
        lines.append(row([case["shape"], *times, *rates, case["best_other"] or NONE, ratio]))
    return [*lines, *notes(panel)]


def row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def rate(record: dict[str, Any], key: str) -> str:
    """A rival's figure; in brackets if its result is wrong, so that it does not count."""
    if "ms" not in record:
        return NONE
    return f"({record[key]:.4g})" if "wrong" in record else f"{record[key]:.4g}"


def missing(record: dict[str, Any]) -> bool:
    """Whether a rival did not run because a package is not there."""
    return record.get("error", "").startswith("not installed")


def notes(panel: list[Case]) -> list[str]:
    """Why installed rivals did not run, or do not count, and in how many of the cases."""
    reasons: dict[str, int] = {}
    for case in panel:
        for rival, record in case["rivals"].items():
            for reason in (record[key] for key in ("error", "wrong") if key in record and not missing(record)):
                note = f"{rival}: {reason}"
                reasons[note] = reasons.get(note, 0) + 1
    some = [f"- {note}" + f" ({n} of {len(panel)} shapes)" * (n < len(panel)) for note, n in reasons.items()]
    return ["", *some] if some else []


def plots(results: dict[str, Any], folder: Path) -> None:
    """A PNG per kernel, named after it: a panel per group and part, a line per rival."""
    by_kernel: dict[str, list[list[Case]]] = {}
    for panel in panels(results["cases"]):
        if timed(panel):
            by_kernel.setdefault(panel[0]["kernel"], []).append(panel)
    for kernel, kernel_panels in by_kernel.items():
        columns = min(2, len(kernel_panels))
        rows = -(-len(kernel_panels) // columns)
        figure = Figure(figsize=(7 * columns, 4.5 * rows), dpi=100, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(f"{kernel} on {results['machine']['device']}")
        for place, panel in enumerate(kernel_panels, 1):
            draw(figure.add_subplot(rows, columns, place), panel, results["limits"])
        figure.savefig(folder / f"{re.sub(r'[^a-z0-9]+', '_', kernel.lower())}.png", format="png")


def draw(axes: Axes, panel: list[Case], limits: dict[str, float]) -> None:
    """Rates over the width; over the shapes where two of them share a width."""
    key, name, limit_name, limit = unit(panel, limits)
    panel = sorted(panel, key=lambda case: case["width"])
    widths = [case["width"] for case in panel]
    unique = len(set(widths)) == len(widths)
    places = widths if unique else list(range(len(panel)))
    for rival in timed(panel):
        points = [(x, case["rivals"].get(rival, {})) for x, case in zip(places, panel, strict=True)]
        points = [(x, record[key]) for x, record in points if "ms" in record]
        color, thickness = ("black", 2.5) if rival == "ingot" else (None, 1.2)
        xs, ys = ([point[i] for point in points] for i in range(2))
        axes.plot(xs, ys, marker="o", markersize=3, label=rival, color=color, linewidth=thickness)
    axes.axhline(limit, color="gray", linestyle=":", label=limit_name)
    if unique:
        axes.set_xscale("log", base=2)
    labels = [str(width) for width in widths] if unique else [case["shape"] for case in panel]
    axes.set_xticks(places, labels, rotation=0 if unique else 20, ha="center" if unique else "right", fontsize=7)
    first = panel[0]
    title = " ".join(filter(None, [first["part"], first["group"], first["dtype"]]))
    axes.set(title=title, xlabel=first["axis"] if unique else "", ylabel=name)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
