"""The results of benchmarks.loader as Markdown tables and a plot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.loader.systems import NEEDS, SYSTEMS

Record = dict[str, Any]
NONE = "–"  # noqa: RUF001
LIMITS = {"Ingot": "C gather", "Ingot int64": "C gather int64"}  # the same rows into the same types


class Results:
    """The measurements of a run that gave figures, and what came of the others."""

    def __init__(self, records: Iterable[Record]) -> None:
        records = list(records)
        self.machine: Record = records[0]["run"]
        cases = [record for record in records if "label" in record]
        self.figures = [record for record in cases if not record.keys() & {"wrong", "error", "absent"}]
        measured = {record["system"] for record in self.figures}
        failed = [record for record in cases if record.keys() & {"wrong", "error", "absent"}]
        self.absent = {r["system"]: r["absent"] for r in failed if "absent" in r and r["system"] not in measured}
        self.failed = [record for record in failed if "absent" not in record]
        self.load = max((record["load"] for record in cases), default=0.0)

    def values(self, system: str, key: str, **case: Any) -> list[float]:
        """The figure `key` in every round of the case; `case` gives fields of Case that matter."""
        wanted = {
            "documents": False,
            "cold": False,
            "resume": False,
            "fresh": False,
            "huge": False,
            "workers": 0,
        } | case
        return [
            record[key]
            for record in self.figures
            if record["system"] == system and key in record and all(record[k] == v for k, v in wanted.items())
        ]

    def middle(self, system: str, key: str, **case: Any) -> float | None:
        found = self.values(system, key, **case)
        return median(found) if found else None

    def systems(self, **case: Any) -> list[str]:
        """Those that ran a case of this kind."""
        return [name for name in SYSTEMS if self.values(name, "load", **case)]

    def columns(self, task: str) -> list[tuple[str, int]]:
        """(item, T) of the cases of a task, in order."""
        return sorted({(record["item"], record["seq_len"]) for record in self.figures if record["task"] == task})

    def main_case(self) -> Record:
        """The case that the tables of one case are about."""
        columns = self.columns("rate")
        first = [column for column in columns if column[0] == columns[0][0]]
        item, T = first[len(first) // 2]
        return {"task": "rate", "item": item, "seq_len": T}


def table(records: Iterable[Record]) -> str:
    """All tables, each with a line on what it says; those that nothing was measured for are left out."""
    results = Results(records)
    machine = results.machine
    packages = ", ".join(f"{name} {found}" for name, found in machine["packages"].items() if found)
    lines = [
        f"{machine['date']}, {machine['cores']} cores of {machine['cpu']}, {machine['memory_gb']} GB, Linux "
        f"{machine['kernel']}, Python {machine['python']}, {packages}, `{machine['command']}`. Load average "
        f"{machine['load']:.1f} before, at most {results.load:.1f} (the benchmark's own process included); "
        f"{machine['open_files']} open files allowed.",
    ]
    for section in (rates, ratios, costs, waits, starts, huge, notes):
        lines += section(results)
    return "\n".join(lines) + "\n"


def rates(results: Results) -> list[str]:
    lines = []
    for cold in (False, True):
        for documents in (False, True):
            case = {"task": "rate", "cold": cold, "documents": documents}
            systems, columns = results.systems(**case), results.columns("rate")
            if not systems:
                continue
            title = f"{'cold' if cold else 'warm'} cache{', position ids and cu_seqlens' if documents else ''}"
            lines += ["", f"**Million tokens/s, {title}**: median (quartiles)", ""]
            lines += header(["", *(f"{item}, T {T}" for item, T in columns)])
            for name in systems:
                cells = [spread(results.values(name, "tokens_s", item=i, seq_len=T, **case), 1e-6) for i, T in columns]
                lines.append(row([name, *cells]))
    return lines


def ratios(results: Results) -> list[str]:
    """Ingot's rate over others', of medians."""
    columns = results.columns("rate")
    peers = [name for name, entry in SYSTEMS.items() if entry.role == "peer"]
    lines = []
    for ours, limit in LIMITS.items():
        for documents in (False, True):
            for what, others in (("the C program's", [limit]), ("the fastest peer's", peers)):
                cells = []
                for item, T in columns:
                    case = {"task": "rate", "item": item, "seq_len": T, "documents": documents}
                    mine = results.middle(ours, "tokens_s", **case)
                    found = {name: rate for name in others if (rate := results.middle(name, "tokens_s", **case))}
                    best = max(found, key=lambda name: found[name], default=None)
                    cells.append(NONE if mine is None or best is None else _ratio(mine / found[best], best, peers))
                if any(cell != NONE for cell in cells):
                    with_ids = " with position ids and cu_seqlens" if documents else ""
                    lines.append(row([f"{ours}{with_ids} over {what}", *cells]))
    if not lines:
        return []
    title = "**Ratios of those rates, warm cache**"
    return ["", title, "", *header(["", *(f"{item}, T {T}" for item, T in columns)]), *lines]


def _ratio(value: float, other: str, peers: Sequence[str]) -> str:
    return f"{value:.1f} ({other})" if other in peers else f"{value:.0%}"


def costs(results: Results) -> list[str]:
    if not results.columns("rate"):
        return []
    case = results.main_case()
    keys: dict[str, Callable[[list[float]], str]] = {
        "cpu_s_per_gtoken": middle("{:.2f}"),
        "p50_ms": middle("{:.3f}"),
        "p99_ms": middle("{:.3f}"),
        "max_ms": lambda found: f"{max(found):.1f}",
        "peak_mb": middle("{:.0f}"),
        "anonymous_mb": middle("{:.0f}"),
        "processes": middle("{:.0f}"),
        "shared_names": middle("{:.0f}"),
    }
    head = [
        "CPU s per 10⁹ tokens",
        "batch p50, ms",
        "p99",
        "max",
        "peak MB",
        "of it no file's",
        "processes",
        "in /dev/shm",
    ]
    title = f"**What it costs, {case['item']}, T {case['seq_len']}, warm cache**"
    lines = ["", f"{title}: beyond a process with its libraries loaded", "", *header(["", "million tokens/s", *head])]
    for more in ({}, {"documents": True}, {"workers": 2}):
        for name in results.systems(**case | more):
            suffix = {"documents": ", documents", "workers": ", 2 worker processes"}.get(next(iter(more), ""), "")
            cells = [spread(results.values(name, "tokens_s", **case | more), 1e-6)]
            for key, shown in keys.items():
                found = results.values(name, key, **case | more)
                cells.append(shown(found) if found else NONE)
            lines.append(row([name + suffix, *cells]))
    return lines


def waits(results: Results) -> list[str]:
    kinds = [(documents, workers) for documents in (False, True) for workers in (0, 2)]
    cases = [{"task": "wait", "documents": documents, "workers": workers} for documents, workers in kinds]
    names = [name for name in SYSTEMS if any(results.values(name, "wait_share", **case) for case in cases)]
    if not names:
        return []
    title = "**Share of the time that a training loop waits**, which works 5 ms a step on 16,384 tokens"
    heads = ["", *("documents" * d + ", " * (d and w > 0) + f"{w} workers" * (w > 0) or "plain" for d, w in kinds)]
    lines = ["", title, "", *header(heads)]
    for name in names:
        shares = [results.middle(name, "wait_share", **case) for case in cases]
        lines.append(row([name, *(NONE if share is None else f"{share:.1%}" for share in shares)]))
    return lines


def starts(results: Results) -> list[str]:
    counts = sorted({r["shards"] for r in results.figures if r["task"] == "start" and not r["huge"]})
    names = [name for name in SYSTEMS if results.values(name, "first_seconds", task="start")]
    if not names:
        return []
    kinds = (("", {}), (", resumed at the middle", {"resume": True}), (", first start", {"fresh": True}))
    lines = ["", "**Seconds from the constructor to the first batch (peak MB)**, by the number of files", ""]
    lines += header(["", *(f"{count:,}" for count in counts)])
    for name in names:
        for suffix, kind in kinds:
            cells = []
            for count in counts:
                case = {"task": "start", "shards": count, **kind}
                seconds, peak = (results.middle(name, key, **case) for key in ("first_seconds", "peak_mb"))
                cells.append(NONE if seconds is None or peak is None else f"{seconds:.3f} ({peak:.0f})")
            if any(cell != NONE for cell in cells):
                lines.append(row([name + suffix, *cells]))
    return lines


def huge(results: Results) -> list[str]:
    lines = []
    for resume in (False, True):
        case = {"task": "start", "huge": True, "resume": resume}
        seconds, peak = (results.values("Ingot", key, **case) for key in ("first_seconds", "peak_mb"))
        if seconds:
            lines.append(
                f"{'resumed at the middle' if resume else 'from the start'} {1e3 * median(seconds):.0f} ms "
                f"(at most {1e3 * max(seconds):.0f}) and {median(peak):.0f} MB"
            )
    what = (
        "**Ingot on sparse files** (10¹² tokens in 10,000 files; with --quick 10⁹ in 100), constructor to first batch: "
    )
    return ["", what + "; ".join(lines) + "."] if lines else []


def notes(results: Results) -> list[str]:
    """Why loaders did not run, with what to do about it, or do not count."""
    install = lambda name: NEEDS.get(name, "run make setup")  # noqa: E731
    lines = [f"- {name} was not measured: {why} ({install(name)})" for name, why in results.absent.items()]
    for record in results.failed:
        why = record.get("wrong") or record.get("error")
        lines.append(f"- {record['system']}, {record['label']}: {why}")
    return ["", *lines] if lines else []


def middle(form: str) -> Callable[[list[float]], str]:
    return lambda found: form.format(median(found))


def spread(found: list[float], scale: float) -> str:
    """Median and quartiles."""
    if not found:
        return NONE
    shown = [
        number(x * scale)
        for x in (median(found), *(quantiles(found, n=4, method="inclusive")[::2] if len(found) > 1 else ()))
    ]
    return shown[0] if len(shown) == 1 else f"{shown[0]} ({shown[1]} to {shown[2]})"


def number(x: float) -> str:
    """Three figures at most, or whole."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def header(cells: list[str]) -> list[str]:
    return [row(cells), "|---" * len(cells) + "|"]


def row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def line(record: Record) -> str:
    """One measurement, for people who watch."""
    found = next((f"{key}: {record[key]}" for key in ("absent", "error", "wrong") if key in record), "")
    shown = {"tokens_s": (1e-6, "million tokens/s"), "wait_share": (100, "% waiting"), "first_seconds": (1e3, "ms")}
    key = next((key for key in shown if key in record), None)
    if key is not None:
        found = f"{number(record[key] * shown[key][0])} {shown[key][1]}"
    return f"{record['system']}, {record['label']}: {found or 'right'}"


def plot(records: Iterable[Record], path: Path) -> None:
    """A PNG: rates with a warm cache over T; a row of panels per item type, without and with documents."""
    results = Results(records)
    columns = results.columns("rate")
    items = list(dict.fromkeys(item for item, _ in columns))
    if not items:
        return
    figure = Figure(figsize=(13, 4.5 * len(items)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for place, (item, documents) in enumerate([(item, d) for item in items for d in (False, True)], 1):
        axes = figure.add_subplot(len(items), 2, place)
        lengths = [T for found, T in columns if found == item]
        for name, entry in SYSTEMS.items():
            case = {"task": "rate", "item": item, "documents": documents}
            rates = {T: results.middle(name, "tokens_s", seq_len=T, **case) for T in lengths}
            points = [(T, rate / 1e6) for T, rate in rates.items() if rate is not None]
            style = {"ours": "-", "peer": "--", "reference": ":"}[entry.role]
            if points:
                xs, ys = zip(*points, strict=True)
                axes.plot(xs, ys, style, marker="o", markersize=4, label=name, linewidth=2.5 if style == "-" else 1.2)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, [str(T) for T in lengths])
        title = f"{item}, {'position ids and cu_seqlens' if documents else 'inputs and labels'}"
        axes.set(title=title, xlabel="T (tokens per row)", ylabel="million tokens/s, one core")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=7)
    figure.savefig(path, format="png")
