"""Writes the outcomes of benchmarks.kernels as Markdown tables and plots."""

import re
from pathlib import Path

from benchmarks import report
from benchmarks.report import NONE, Curve, Panel, Record


def panels_of(outcomes: list[Record]) -> list[list[Record]]:
    """The outcomes that share a table and a panel: one kernel, group, part and dtype, in order of appearance."""
    found: dict[tuple[str, ...], list[Record]] = {}
    for outcome in outcomes:
        found.setdefault(tuple(outcome[key] for key in ("kernel", "group", "part", "dtype")), []).append(outcome)
    return list(found.values())


def unit(panel: list[Record], limits: dict[str, float]) -> tuple[str, str, str, float]:
    """(key, unit, limit's name, limit) of the rate to give: that of what takes longer at the machine's limits."""
    moving = sum(outcome["bytes"] for outcome in panel) / 1e9 / limits["copy_gb_s"]
    computing = sum(outcome["flops"] for outcome in panel) / 1e12 / limits["matmul_tflop_s"]
    if computing > moving:
        return "tflop_s", "TFLOP/s", "matmul", limits["matmul_tflop_s"]
    return "gb_s", "GB/s", "copy", limits["copy_gb_s"]


def timed(panel: list[Record]) -> list[str]:
    """The rivals with a time in any of the panel's outcomes, ours first, else in order of appearance."""
    names = dict.fromkeys(name for outcome in panel for name, record in outcome["rivals"].items() if "ms" in record)
    return sorted(names, key=lambda name: not name.startswith("ingot"))


def text_of(head: Record, outcomes: list[Record]) -> str:
    """A heading with the machine, then a table per panel with notes under it."""
    limits = head["limits"]
    lines = [
        report.heading(head),
        f"Copy {limits['copy_gb_s']:,.0f} GB/s, matmul {limits['matmul_tflop_s']:.3g} TFLOP/s in the same run. "
        f"Timed by {head['method']}.",
        "*ms* is ours, median (20th to 80th percentile); *host* what queuing it takes the CPU; *ratio* the best "
        "other's time over ours.",
    ]
    for panel in panels_of(outcomes):
        lines += ["", *panel_lines(panel, limits)]
    absent = {name for outcome in outcomes for name, record in outcome["rivals"].items() if missing(record)}
    if absent:
        lines += ["", f"Not installed: {', '.join(sorted(absent))} (results.jsonl says what each needs)."]
    return "\n".join(lines) + "\n"


def panel_lines(panel: list[Record], limits: dict[str, float]) -> list[str]:
    key, name, limit_name, limit = unit(panel, limits)
    rivals = timed(panel)
    first = panel[0]
    title = " ".join(filter(None, [first["kernel"], first["part"], first["group"], first["dtype"]]))
    head = ["shape", "ms", "host ms", f"of {limit_name}", *rivals, "best other", "ratio"]
    rows = []
    for outcome in panel:
        ours = outcome["rivals"]["ingot"]
        times = [NONE] * 3
        if "ms" in ours:
            spread = f"{ours['ms']:.4g} ({ours['ms_p20']:.4g} to {ours['ms_p80']:.4g})"
            times = [spread, f"{ours['host_ms']:.3g}", f"{ours[key] / limit:.0%}"]
        rates = [rate(outcome["rivals"].get(rival, {}), key) for rival in rivals]
        ratio = f"{outcome['ratio']:.2f}" if outcome["ratio"] else NONE
        rows.append([outcome["shape"], *times, *rates, outcome["best_other"] or NONE, ratio])
    return [f"### {title}, {name}", "", *report.table(head, rows), *notes(panel)]


def rate(record: Record, key: str) -> str:
    """A rival's figure; in brackets if its result is wrong, so that it does not count."""
    if "ms" not in record:
        return NONE
    return f"({record[key]:.4g})" if "wrong" in record else f"{record[key]:.4g}"


def missing(record: Record) -> bool:
    """Whether a rival did not run because a package is not there."""
    return record.get("error", "").startswith("not installed")


def notes(panel: list[Record]) -> list[str]:
    """Why installed rivals did not run, or do not count, and at how many of the shapes."""
    reasons: dict[str, int] = {}
    for outcome in panel:
        for rival, record in outcome["rivals"].items():
            for reason in (record[key] for key in ("error", "wrong") if key in record and not missing(record)):
                note = f"{rival}: {reason}"
                reasons[note] = reasons.get(note, 0) + 1
    some = [f"- {note}" + f" ({n} of {len(panel)} shapes)" * (n < len(panel)) for note, n in reasons.items()]
    return ["", *some] if some else []


def plots(head: Record, outcomes: list[Record], folder: Path) -> None:
    """A PNG per kernel, named after it: a panel per group and part, a line per rival."""
    by_kernel: dict[str, list[Panel]] = {}
    for panel in panels_of(outcomes):
        if timed(panel):
            by_kernel.setdefault(panel[0]["kernel"], []).append(curves_of(panel, head["limits"]))
    for kernel, panels in by_kernel.items():
        name = re.sub(r"[^a-z0-9]+", "_", kernel.lower())
        report.plot(folder / f"{name}.png", panels, f"{kernel} on {head['gpu'] or head['cpu']}")


def curves_of(panel: list[Record], limits: dict[str, float]) -> Panel:
    """Rates over the width; over the shapes where two of them share a width."""
    key, name, limit_name, limit = unit(panel, limits)
    panel = sorted(panel, key=lambda outcome: outcome["width"])
    widths = [outcome["width"] for outcome in panel]
    unique = len(set(widths)) == len(widths)
    xs = widths if unique else list(range(len(panel)))
    curves = [Curve(limit_name, [(xs[0], limit), (xs[-1], limit)], "reference")]
    for rival in timed(panel):
        records = [(x, outcome["rivals"].get(rival, {})) for x, outcome in zip(xs, panel, strict=True)]
        points = [(x, record[key]) for x, record in records if "ms" in record]
        curves.append(Curve(rival, points, "ours" if rival == "ingot" else "peer"))
    first = panel[0]
    title = " ".join(filter(None, [first["part"], first["group"], first["dtype"]]))
    labels = [str(width) for width in widths] if unique else [outcome["shape"] for outcome in panel]
    return Panel(title, first["axis"] * unique, name, curves, list(zip(xs, labels, strict=True)), log_x=unique)
