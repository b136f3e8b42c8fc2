"""`make gpu-report FILE=results.jsonl`: the proof's results as tables, in the marked section of docs/benchmarks.md.

What was not measured is left out.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import report
from benchmarks.contenders import COMPILED
from benchmarks.gpu_proof.stage import STAGES, items_of, tail_of
from benchmarks.kernels.attention import GLUON
from benchmarks.kernels.tables import rate, unit
from benchmarks.report import NONE, Record, number

PAGE = Path("docs/benchmarks.md")
BEGIN, END = "<!-- gpu-proof: make gpu-report writes what follows -->", "<!-- gpu-proof: end -->"
ERROR = 500  # characters of an error in the summary
Columns = dict[str, Callable[[Record], str]]
CONTESTS: Columns = {
    "case": lambda r: f"{r['kernel']} {r['part']} {r['shape']}",
    "ms": lambda r: spread(r["rivals"]["ingot"]),
    "host ms": lambda r: f"{r['rivals']['ingot']['host_ms']:.2g}",
    "rate": lambda r: r["rate"],
    "others, ms": lambda r: ", ".join(
        f"{name} {x['ms']:.4g}" for name, x in r["rivals"].items() if "ms" in x and name != "ingot"
    ),
    "ratio": lambda r: f"{r['ratio']:.2f}" if r["ratio"] else NONE,
}
TILES: Columns = {
    "tile": lambda r: r["item"] + " (wrong)" * ("wrong" in r),
    "ms": lambda r: f"{r['ms']:.4g}",
    "present": lambda r: r["present"],
    "its ms": lambda r: f"{r['present_ms']:.4g}",
    "ratio": lambda r: f"{r['present_ms'] / r['ms']:.2f}",
}
STOCK = {"SDPA flash": "flash", "SDPA cuDNN": "cuDNN"}
FA3 = "*ratio*: to PyTorch's faster one; the goal is 1. FlashAttention-3 on an H100, D=128, by others: 660 and 575."
GLUON_RATES: Columns = {
    "TFLOP/s of": lambda r: f"{r['part']} {r['shape']}",
    **{
        title: lambda r, name=name: rate(r["rivals"].get(name, {}), "tflop_s")
        for name, title in {GLUON: "Gluon", "ingot": "Triton", **STOCK}.items()
    },
    "ratio": lambda r: f"{of_stock(r):.2f}",
}
STEPS: Columns = {
    "step": lambda r: r["item"],
    "ms": lambda r: spread(r),
    "tokens/s": lambda r: number(r["tokens_s"]),
    "MFU": lambda r: f"{r['mfu']:.1%}" if "mfu" in r else NONE,
    "host ms": lambda r: f"{r['host_ms']:.3g}",
    "kernels": lambda r: str(r["kernels"]),
    "their ms": lambda r: f"{r['busy_ms']:.4g}",
    "GB": lambda r: number(r["memory_gb"]) if "memory_gb" in r else NONE,
    "start, s": lambda r: f"{r['start_s']:.1f}",
    "of plain, compiled": lambda r: f"{r['ratio']:.2f} x" if "ratio" in r else NONE,
}
LAUNCHED: Columns = {
    "kernel": lambda r: f"`{r['name']}`",
    "launches": lambda r: str(r["launches"]),
    "ms": lambda r: f"{r['ms']:.3g}",
}
ERRORS: Columns = {
    "case": lambda r: r["item"],
    "of the allowed error": lambda r: f"{r['share']:.0%}",
    "equal repeats": lambda r: str(r.get("repeats", NONE)),
}


def right(outcome: Record) -> dict[str, float]:
    """ms of the rivals whose results count."""
    return {name: x["ms"] for name, x in outcome["rivals"].items() if "ms" in x and "wrong" not in x}


def of_stock(outcome: Record) -> float:
    """The time of PyTorch's faster attention over that of Gluon's; NaN where one of these has no right result."""
    times = right(outcome)
    return min([times[name] for name in STOCK if name in times], default=math.nan) / times.get(GLUON, math.nan)


def both(passes: list[Record]) -> list[Record]:
    """Forward and backward, and their sum for those that ran in both."""
    names = set.intersection(*({*right(r)} for r in passes))
    ms = {name: sum(right(r)[name] for r in passes) for name in names}
    rivals = {name: {"ms": x, "tflop_s": sum(r["flops"] for r in passes) / x / 1e9} for name, x in ms.items()}
    return [*passes, {"part": "both", "shape": passes[0]["shape"], "rivals": rivals}]


def spread(figures: Record) -> str:
    return f"{figures['ms']:.4g} ({figures['ms_p20']:.4g} to {figures['ms_p80']:.4g})"


def table(title: str, columns: Columns, records: list[Record]) -> list[str]:
    rows = [[column(record) for column in columns.values()] for record in records]
    return ["", f"### {title}", "", *report.table(list(columns), rows)] if rows else []


def tables(head: Record, records: list[Record]) -> list[str]:
    """Lines of Markdown: the machine, then what each stage has found."""
    found = {name: items_of(records, name) for name in STAGES}
    done = {name: [r for r in items.values() if r["status"] in ("done", "wrong")] for name, items in found.items()}
    lines, limits = [report.heading(head | found["machine"].get("versions", {}))], found["machine"].get("limits", {})
    compared = [r for r in done["correctness"] + done["gluon"] if "share" in r]
    lines += table("Results against float64", ERRORS, compared)
    if limits.get("status") == "done":
        lines += ["", "Copy {copy_gb_s:,.0f} GB/s, matmul {matmul_tflop_s:,.0f} TFLOP/s.".format(**limits)]
        contests = [x for stage in ("attention", "kernels") for r in done[stage] for x in r["outcomes"]]
        for x in (contests := [x for x in contests if "ms" in x["rivals"]["ingot"]]):
            key, name, limit_name, limit = unit([x], limits)
            reached = x["rivals"]["ingot"][key]
            x["rate"] = f"{reached:,.0f} {name}, {reached / limit:.0%} of {limit_name}"
        lines += table("Kernels beside others", CONTESTS, contests)
    pairs = [x for r in done["gluon_speed"] if "outcomes" in r for x in both(r["outcomes"])]
    lines += table("Attention in Gluon", GLUON_RATES, pairs) + ["", FA3] * bool(pairs)
    base = {r["model"]: r["tokens_s"] for r in done["training"] if r["form"] == COMPILED}
    ratios = [{"ratio": r["tokens_s"] / base[r["model"]]} if r["model"] in base else {} for r in done["training"]]
    steps = [record | ratio for record, ratio in zip(done["training"], ratios, strict=True)]
    lines += table("Training steps", STEPS, steps)
    for record in [r for r in done["training"] if r["form"] == "triton"]:
        lines += table(f"Kernels of a step: {record['item']}", LAUNCHED, record["top"])
    lines += table("Tiles of attention", TILES, done["tiles"])
    tests = [record["printed"].splitlines()[-1:] for record in records if record["stage"] == "sample"]
    return lines + [line for last in tests for line in ("", f"A sample of tests/gpu: {' '.join(last).strip('= ')}.")]


def summary(head: Record, records: list[Record]) -> tuple[str, bool]:
    """The tables, then what went wrong and how the stages ended; and whether all is well."""
    try:
        lines, good = [*tables(head, records), ""], True
    except Exception as error:  # noqa: BLE001  a table that breaks must not hide how the stages ended
        lines, good = [tail_of(error)], False
    for stage in dict.fromkeys(record["stage"] for record in records):
        items = items_of(records, stage)
        for record in [*items.values(), *(r for r in records if r["stage"] == stage and "item" not in r)]:
            if record["status"] != "done":
                good, why = False, str(record.get("wrong") or record.get("error") or record.get("printed", ""))[-ERROR:]
                lines.append(f"{stage} {record.get('item', 'as a whole')}: {record['status']}: {why}")
        took = sum(r.get("seconds", 0) for r in records if r["stage"] == stage and "item" not in r)
        done = sum(item["status"] == "done" for item in items.values())
        compiled = [seconds for item in items.values() for seconds in item.get("compiled", {}).values()]
        loaded = sum(item.get("loaded", 0) for item in items.values())
        counts = f"{loaded} kernels from the cache, {len(compiled)} compiled in {sum(compiled):.0f} s"
        lines.append(f"{stage}: {took} s; {done} of {len(items)} items done; {counts}")
    return "\n".join(lines), good


def main(file: Path, page: Path = PAGE) -> None:
    """Replace the section of the page. Raises ValueError where the page has none."""
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    text = "\n".join([BEGIN, "", *tables(*report.read(file)), "", END])
    page.write_text(before + text + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
