"""Draws report.html of what the stages have reported: it fetches nothing, and text from the crawl is only text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from llm import files
from llm.crawl.report.totals import Totals, read_curve, read_totals
from llm.page import COLOURS, LETTER, WIDTH, bars, document, in_bytes, number, percent, svg, table, text

LONGEST = 330  # pixels: of a chart's names
MOST = 30  # bars of a chart: the largest
HEIGHT = 200  # pixels of a curve
TITLES = {"length": "length, in characters at most", "cluster_size": "documents of a cluster of duplicates, at most"}


def write(out: Path) -> Path:
    """Write OUT/report.html of the stages that have run; returns its path. Raises InputError where none has."""
    path = out / "report.html"
    page = render(read_totals(out), read_curve(out))
    with files.complete_file(path) as file:
        file.write(page.encode("utf-8", "replace"))  # half a surrogate pair cannot be written
    return path


def render(stages: Sequence[Totals], measured: Mapping[str, Any]) -> str:
    """The page, from the totals of the stages in order, and what the clustering has measured."""
    # Not those that pass no document on, nor the one that joins what tokenize wrote.
    passed = [stage for stage in stages if (stage.documents_out or stage.removed) and stage.stage != "tokens"]
    sections = ["<h2>What is left</h2>" + left(passed)]
    sections += [f"<h2>Removed by {escape(stage.stage)}</h2>" + removed(stage) for stage in stages if stage.removed]
    for stage in stages:
        names = sorted(stage.histograms.keys() - {"tokens", "bytes"})
        sections += [histogram(stage, name) for name in names]
        if "tokens" in stage.histograms:
            sections.append("<h2>Tokens</h2>" + tokens(stage.histograms["tokens"], stage.histograms["bytes"]))
    if measured:
        sections.append("<h2>How likely duplicates are found</h2>" + duplicates(measured))
    return document("From raw pages to documents", "\n".join([*sections, "<h2>Damage</h2>" + damage(stages)]))


def left(stages: Sequence[Totals]) -> str:
    """Documents and bytes after each stage."""
    documents, sizes = list[tuple[str, list[float]]](), list[tuple[str, list[float]]]()
    rows = list[Sequence[str]]()
    for i, stage in enumerate(stages):
        if i == 0:
            documents.append(("read", [stage.documents_in]))
            sizes.append(("input files", [stage.bytes_in / 1e6]))
        documents.append((stage.stage, [stage.documents_out]))
        sizes.append((stage.stage, [stage.bytes_out / 1e6]))
        share = stage.documents_out / max(1, stage.documents_in)
        rate = f"{in_bytes(stage.bytes_in / stage.seconds)}/s" if stage.seconds else ""
        counts = (number(stage.tasks), number(stage.documents_in), number(stage.documents_out), percent(share))
        bytes_ = (in_bytes(stage.bytes_in), in_bytes(stage.bytes_out))
        rows.append((stage.stage, *counts, *bytes_, number(stage.damage_count), number(stage.seconds), rate))
    head = ("stage", "tasks", "documents in", "out", "kept", "bytes in", "out", "damaged", "seconds", "a task's rate")
    note = "<p>Bytes are those of the files before the first stage, and of text in UTF-8 after it.</p>"
    charts = "<h3>Documents</h3>" + bars(documents, (), "") + "<h3>Bytes</h3>" + bars(sizes, (), "MB")
    return charts + table(head, rows) + note


def removed(stage: Totals) -> str:
    """The reasons, the most frequent first, each with the texts that the reports keep of it."""
    reasons = stage.removed.most_common()
    chart = bars([(reason, [count]) for reason, count in reasons], (), "", label=LONGEST)
    samples = [
        f"<details><summary>{escape(reason)}: {number(count)} ({percent(count / max(1, stage.documents_in))})</summary>"
        + "".join(f"<pre>{escape(sample)}</pre>" for sample in stage.samples.get(reason, ()))
        + "</details>"
        for reason, count in reasons
    ]
    return chart + "\n".join(samples)


def tokens(count: Mapping[str, int], size: Mapping[str, int]) -> str:
    """Of each split, with the end-of-document tokens; `size` is of its text, in bytes."""
    rows = [
        (split, number(n), in_bytes(size[split]), number(n / max(1, size[split])), number(size[split] / max(1, n)))
        for split, n in count.items()
    ]
    return table(("split", "tokens", "text", "tokens per byte", "bytes per token"), rows)


def histogram(stage: Totals, name: str) -> str:
    """Numbers in their order, names by their counts."""
    counts = stage.histograms[name]
    if all(key.isdecimal() for key in counts):
        rows = sorted(counts.items(), key=lambda item: int(item[0]))
    else:
        rows = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = [(key or "not known", [count]) for key, count in rows[:MOST]]
    rest = sum(count for _, count in rows[MOST:])
    more = f"<p>{len(rows) - MOST} more, with {number(rest)}.</p>" if len(rows) > MOST else ""
    return f"<h2>{escape(stage.stage)}: {escape(TITLES.get(name, name))}</h2>" + bars(shown, (), "") + more


def duplicates(measured: Mapping[str, Any]) -> str:
    """The bands' S-curve, and what a sample of pairs, compared exactly, says of it."""
    found = [(bin["from"] + 0.05, bin["found"]) for bin in measured["recall"] if bin["pairs"]]
    rows = list[Sequence[str]]()
    for bin, dropped in zip(measured["recall"], measured["dropped"], strict=True):
        shares = [percent(bin[key]) if bin["pairs"] else "" for key in ("expected", "found")]
        rows.append((f"{bin['from']:.1f}", number(bin["pairs"]), *shares, number(dropped)))
    head = (
        "Jaccard similarity from",
        "pairs compared",
        "found: expected",
        "measured",
        "dropped documents so like theirs",
    )
    note = f"<p>Half of the pairs of similarity {measured['midpoint']:.2f} are found; points: measured on a sample.</p>"
    return note + curve(measured["curve"], found, "Jaccard similarity", "share of pairs found") + table(head, rows)


def curve(line: Iterable[Sequence[float]], points: Iterable[Sequence[float]], x_label: str, y_label: str) -> str:
    """A line and points in the unit square, as SVG."""
    left, right, bottom = 40, WIDTH - 20, HEIGHT - 30

    def place(x: float, y: float) -> tuple[float, float]:
        return left + x * (right - left), bottom - y * (bottom - 15)

    places = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in line)
    shapes = f'<polyline points="{places}" fill="none" class="line" stroke="{COLOURS[0]}" stroke-width="2"/>'
    for x, y in points:
        shapes += '<circle cx="{:.1f}" cy="{:.1f}" r="4" class="c1" fill="{}"/>'.format(*place(x, y), COLOURS[1])
    for i in range(6):
        x, y = place(i / 5, i / 5)
        shapes += f'<path d="M{left},{y:.1f}H{right}M{x:.1f},15V{bottom}" stroke="{COLOURS[5]}" stroke-opacity="0.3"/>'
        shapes += text(x - 8, bottom + 14, f"{i / 5:.1f}") + text(10, y + 4, f"{i / 5:.1f}")
    return svg(HEIGHT, shapes + text(left, 11, y_label) + text(right - LETTER * len(x_label), HEIGHT - 3, x_label))


def damage(stages: Sequence[Totals]) -> str:
    """Every place that the reports list."""
    listed = [(stage.stage, found) for stage in stages for found in stage.damage]
    rows = [(stage, found["source"], f"{found['offset']}", found["what"]) for stage, found in listed]
    count = sum(stage.damage_count for stage in stages)
    note = f"<p>{number(count)} in all, of which {len(rows)} are listed.</p>" if count > len(rows) else ""
    return note + table(("stage", "file", "offset", "what"), rows)
