"""Writes the results of benchmarks.loader as Markdown tables and a plot."""

from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.loader.runner import FAILURES
from benchmarks.loader.systems import NEEDS, SYSTEMS
from benchmarks.report import NONE, Curve, Panel, Record, heading, number, plot, spread, table

LIMITS = {"Ingot": "C gather", "Ingot int64": "C gather int64"}  # the same rows into the same types
PLAIN = {"documents": False, "cold": False, "resume": False, "huge": False}  # unless a table says else

RATES = {
    "warm cache": {},
    "warm cache, position ids and cu_seqlens": {"documents": True},
    "cold cache": {"cold": True},
}  # title -> fields of Case
Section = tuple[str, list[str], list[list[str]]]  # title, heads of the columns after the first, rows


class Results:
    """The measurements that gave figures."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.figures = [record for record in records if not record.keys() & FAILURES]
        self.columns = sorted({(r["item"], r["seq_len"]) for r in self.figures if r["task"] == "rate"})
        """(item, T) of the rates."""
        self.heads = [f"{item}, T {T}" for item, T in self.columns]

    def values(self, system: str, key: str, **case: Any) -> list[float]:
        """The figure `key` in every round of the case; `case` gives fields of Case that matter."""
        wanted = PLAIN | case | {"system": system}
        return [r[key] for r in self.figures if key in r and all(r[name] == value for name, value in wanted.items())]

    def middle(self, system: str, key: str, **case: Any) -> float | None:
        found = self.values(system, key, **case)
        return median(found) if found else None

    def systems(self, **case: Any) -> list[str]:
        """Those that ran a case of this kind."""
        return [name for name in SYSTEMS if self.values(name, "load", **case)]


def tables(head: Record, records: list[Record]) -> str:
    """All tables, each with a line on what it says; those that nothing was measured for are left out."""
    results = Results(records)
    load = max((record["load"] for record in records), default=0.0)
    lines = [f"{heading(head)} At most {load:.1f} during it; {head['open_files']} open files allowed."]
    for title, heads, rows in (*rates(results), ratios(results), costs(results), starts(results)):
        if rows:
            lines += ["", title, "", *table(["", *heads], rows)]
    return "\n".join([*lines, *failures(records)]) + "\n"


def rates(results: Results) -> Iterator[Section]:
    for title, kind in RATES.items():
        rows = []
        for name in results.systems(task="rate", **kind):
            found = (results.values(name, "tokens_s", item=item, seq_len=T, **kind) for item, T in results.columns)
            rows.append([name, *(spread(values, 1e-6) for values in found)])
        yield f"**Million tokens/s, {title}**: median (quartiles)", results.heads, rows


def ratios(results: Results) -> Section:
    """Ingot's rate over others', of medians."""
    peers = [name for name, entry in SYSTEMS.items() if entry.role == "peer"]
    rows = []
    for ours, limit in LIMITS.items():
        for documents in (False, True):
            name = f"{ours}{' with position ids and cu_seqlens' * documents} over "
            bound = [_ratio(results, ours, [limit], "{:.0%}", column, documents) for column in results.columns]
            best = [_ratio(results, ours, peers, "{:.1f} ({})", column, documents) for column in results.columns]
            rows += [[name + "the C loop's", *bound], [name + "the fastest peer's", *best]]
    rows = [row for row in rows if set(row[1:]) - {NONE}]
    return "**Ratios of those rates, warm cache**", results.heads, rows


def _ratio(results: Results, ours: str, others: list[str], form: str, column: tuple[str, int], documents: bool) -> str:
    """Our rate over that of the fastest of the others, and its name."""
    case = {"item": column[0], "seq_len": column[1], "documents": documents}
    own = results.middle(ours, "tokens_s", **case)
    found = {name: rate for name in others if (rate := results.middle(name, "tokens_s", **case))}
    if own is None or not found:
        return NONE
    best = max(found, key=lambda name: found[name])
    return form.format(own / found[best], best)


COSTS = {
    "CPU s per 10⁹ tokens": ("cpu_s_per_gtoken", "{:.2f}"),
    "batch p50, ms": ("p50_ms", "{:.3f}"),
    "p99": ("p99_ms", "{:.3f}"),
    "max": ("max_ms", "{:.1f}"),
    "peak MB": ("peak_mb", "{:.0f}"),
    "of it no file's": ("anonymous_mb", "{:.0f}"),
}  # heading -> (figure, form)


def costs(results: Results) -> Section:
    """Of the middle length of the first type."""
    if not results.columns:
        return "", [], []
    first = [column for column in results.columns if column[0] == results.columns[0][0]]
    item, T = first[len(first) // 2]
    rows = []
    for documents in (False, True):
        case = {"task": "rate", "item": item, "seq_len": T, "documents": documents}
        for name in results.systems(**case):
            middles = ((results.middle(name, key, **case), form) for key, form in COSTS.values())
            shown = [NONE if middle is None else form.format(middle) for middle, form in middles]
            rate = spread(results.values(name, "tokens_s", **case), 1e-6)
            rows.append([name + ", documents" * documents, rate, *shown])
    title = f"**What it costs, {item}, T {T}, warm cache**: medians, beyond a process with its libraries loaded"
    return title, ["million tokens/s", *COSTS], rows


def starts(results: Results) -> Section:
    counts = sorted({record["shards"] for record in results.figures if record["task"] == "start"})
    rows = []
    for name, huge, resume in product(SYSTEMS, (False, True), (False, True)):
        cells = []
        for count in counts:
            case = {"task": "start", "shards": count, "resume": resume, "huge": huge}
            seconds, peak = (results.middle(name, key, **case) for key in ("first_seconds", "peak_mb"))
            cells.append(NONE if seconds is None or peak is None else f"{seconds:.3f} ({peak:.0f})")
        if set(cells) - {NONE}:
            suffix = ", sparse files of 10⁸ tokens" * huge + ", resumed at the middle" * resume
            rows.append([name + suffix, *cells])
    title = "**Seconds from the constructor to the first batch (peak MB)**, by the number of files"
    return title, [f"{count:,}" for count in counts], rows


def failures(records: list[Record]) -> list[str]:
    """Why loaders were not measured, with what to do about it, or do not count."""
    lines = []
    for record in records:
        if "absent" in record:
            remedy = NEEDS.get(record["system"], "run make setup")
            lines.append(f"- {record['system']} was not measured: {record['absent']} ({remedy})")
        elif record.keys() & FAILURES:
            lines.append(f"- {line(record)}")
    return ["", *lines] if lines else []


def line(record: Record) -> str:
    """One measurement, for people who watch."""
    found = next((record[key] for key in sorted(FAILURES) if key in record), "right")
    if "tokens_s" in record:
        found = f"{number(record['tokens_s'] / 1e6)} million tokens/s"
    elif "first_seconds" in record:
        found = f"{number(record['first_seconds'] * 1e3)} ms"
    return f"{record['system']}, {record['label']}: {found}"


def plot_rates(records: list[Record], path: Path) -> None:
    """A PNG: rates with a warm cache over T; a row of panels per item type, without and with documents."""
    results = Results(records)
    panels = []
    for item in dict.fromkeys(item for item, _ in results.columns):
        lengths = [T for found, T in results.columns if found == item]
        for documents, what in ((False, "inputs and labels"), (True, "position ids and cu_seqlens")):
            curves = []
            for name, entry in SYSTEMS.items():
                case = {"task": "rate", "item": item, "documents": documents}
                found = [(T, results.middle(name, "tokens_s", seq_len=T, **case)) for T in lengths]
                points = [(T, rate / 1e6) for T, rate in found if rate is not None]
                if points:
                    curves.append(Curve(name, points, entry.role))
            ticks = [(T, str(T)) for T in lengths]
            label = "million tokens/s, one core"
            panels.append(Panel(f"{item}, {what}", "T (tokens per row)", label, curves, ticks, log_y=True))
    if panels:
        plot(path, panels)
