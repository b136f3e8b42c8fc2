"""Tables and plots of the crawl's benchmark, and what a snapshot of Common Crawl would take at the measured rates."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

from benchmarks.crawl.stages import CASES, CHAIN, DAFT, OURS, Case
from benchmarks.report import NONE, Curve, Panel, Record, number, plot, spread, table

# Times as fast as the rival, on one core.
GOALS = {"extract": 20, "filter": 50, "signatures": 20, "cluster": 10, "chain": 30, "tokenize": 0.91}
SNAPSHOT_PAGES, SNAPSHOT_BYTES = 3e9, 80e12  # of one of Common Crawl's, as compressed WARC
CORE_HOUR = 0.02  # US dollars, assumed: a core of a rented machine that may be taken away
MEMORY_OF_DOCUMENT = 17  # bytes that the clustering holds of each, beside its sort


def stage_table(records: Sequence[Record], sizes: dict[str, int]) -> list[str]:
    """Rates on one core, and ratios of medians. sizes: bytes that a stage reads, by `corpus stage`."""
    rows = []
    for case in CASES:
        found = {system: seconds(records, case, system) for system in case.systems}
        if not all(found.values()):
            continue
        rates = [sizes[f"{case.corpus} {case.stage}"] / 1e6 / s for s in found[OURS]]
        rival = case.systems[1]
        rival_rates = [sizes[f"{case.corpus} {case.stage}"] / 1e6 / s for s in found[rival]]
        ratio = median(found[rival]) / median(found[OURS])
        goal = f"{GOALS[case.stage]} x" if rival != DAFT else NONE
        size = number(sizes[f"{case.corpus} {case.stage}"] / 1e6)
        peaks = [max(r["peak_mb"] for r in chosen(records, case, system)) for system in case.systems]
        memory = " / ".join(map(number, peaks))
        times = f"{ratio:.{1 if ratio >= 3 else 2}f} x"
        rows.append((case.stage, size, spread(rates), rival, spread(rival_rates), times, goal, memory))
    return table(
        ("stage", "MB read", "Ingot, MB/s a core", "beside", "MB/s a core", "ratio", "goal", "MB of memory"), rows
    )


def chosen(records: Sequence[Record], case: Case, system: str) -> list[Record]:
    wanted = {"corpus": case.corpus, "stage": case.stage, "system": system}
    return [record for record in records if all(record.get(key) == value for key, value in wanted.items())]


def seconds(records: Sequence[Record], case: Case, system: str) -> list[float]:
    return [record["cpu_s"] for record in chosen(records, case, system)]


def growth_table(records: Sequence[Record]) -> list[str]:
    rows = [
        (
            *(number(r["gigabytes"]), number(r["pages"]), f"{r['workers']}", number(r["wall_s"]), number(r["cpu_s"])),
            *(number(r["gigabytes"] * 1e3 / r["wall_s"]), number(r["peak_mb"]), number(r["all_mb"])),
        )
        for r in grown(records)
    ]
    return table(("GB of HTML", "pages", "processes", "seconds", "CPU seconds", "MB/s", "MB, largest", "MB, all"), rows)


def grown(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if "gigabytes" in record]


def plot_growth(records: Sequence[Record], path: Path) -> None:
    """Rate and memory over size, a curve for each number of processes."""
    found = grown(records)
    sizes = sorted({record["gigabytes"] for record in found})
    ticks = [(size, number(size)) for size in sizes]

    def curves(value: str) -> Iterator[Curve]:
        for workers in sorted({record["workers"] for record in found}):
            points = [(r["gigabytes"], r[value] if value in r else r["gigabytes"] * 1e3 / r["wall_s"]) for r in found]
            mine = [point for point, r in zip(points, found, strict=True) if r["workers"] == workers]
            yield Curve(f"{workers} processes" if workers > 1 else "1 process", sorted(mine), "ours")

    panels = [
        Panel("The whole chain", "GB of HTML", "MB of HTML a second", list(curves("rate")), ticks),
        Panel("Memory of the largest process", "GB of HTML", "MB", list(curves("peak_mb")), ticks),
    ]
    plot(path, panels, "From WARC to token shards")


def scale_table(records: Sequence[Record]) -> list[str]:
    """Core-hours, dollars and disk of each stage for a snapshot, from the largest run with the fewest processes."""
    run = max(grown(records), key=lambda record: (record["gigabytes"], -record["workers"]))
    times = SNAPSHOT_BYTES / run["warc_bytes"]
    rows, total = [], 0.0
    for stage in CHAIN.split(","):
        found = run["stages"].get(stage)
        if found:
            hours = found["seconds"] * times / 3600
            total += hours
            disk = f"{found['disk_bytes'] * times / 1e12:.1f}"
            rows.append((stage, number(hours), number(hours * CORE_HOUR), disk))
    rows.append(("all", number(total), number(total * CORE_HOUR), ""))
    signatures = run["stages"]["signatures"]
    each = signatures["disk_bytes"] / max(1, signatures["documents_in"])
    left = signatures["documents_in"] / run["pages"] * SNAPSHOT_PAGES
    lines = table(("stage", "core-hours", f"dollars at {CORE_HOUR} a core-hour", "TB written"), rows)
    note = (
        f"Of {SNAPSHOT_PAGES:.0e} pages {left:.1e} reach the signatures, with {each:.0f} bytes on disk each: "
        f"{left * each / 1e12:.1f} TB. The clustering holds {MEMORY_OF_DOCUMENT} bytes of each in memory: "
        f"{left * MEMORY_OF_DOCUMENT / 1e9:.0f} GB."
    )
    return [*lines, "", note]
