"""Pieces of a report that is one HTML page, light or dark: tables and charts, without script or network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

COLOURS = ("#0969da", "#bf8700", "#cf222e", "#8250df", "#1a7f37", "#6e7781")  # of a light page, and of a picture alone
WIDTH, LABEL, BAR = 760, 150, 20  # pixels: of a chart, of its labels, of a bar's height
LETTER = 6.25  # pixels


def document(title: str, body: str) -> str:
    """A page of HTML; `body` is HTML already."""
    return PAGE.format(title=escape(title), body=body)


def bars(rows: Sequence[tuple[str, Sequence[float]]], legend: Sequence[str], unit: str, *, label: float = LABEL) -> str:
    """A horizontal bar for each row, in a colour for each of its values; as SVG. label: pixels of the rows' names."""
    longest = max((sum(values) for _, values in rows), default=0) or 1
    top, shapes = BAR if legend else 0, []
    for i, name in enumerate(legend):
        shapes.append(box(i, label + 160 * i, 3, 12, 12) + text(label + 160 * i + 17, 13, name))
    for i, (name, values) in enumerate(rows):
        x, y = float(label), top + i * BAR
        shapes.append(text(0, y + 14, name[: int(label / LETTER)]))
        for colour, value in enumerate(values):
            width = max(0.0, value) / longest * (WIDTH - label - 90)
            shapes.append(box(colour, x, y + 3, width, BAR - 5))
            x += width
        shapes.append(text(x + 5, y + 14, f"{number(sum(values))} {unit}"))
    return svg(top + len(rows) * BAR, "".join(shapes))


def box(colour: int, x: float, y: float, width: float, height: float) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect class="c{colour}" fill="{COLOURS[colour]}" {place}/>'


def svg(height: float, shapes: str) -> str:
    """A picture on white, and without a ground of its own where a page's style says so."""
    size = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} fill="currentColor" font-family="sans-serif" font-size="12">'
        f'<rect class="ground" fill="white" width="100%" height="100%"/>{shapes}</svg>'
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


def in_bytes(size: float) -> str:
    """A size as text, in the unit that fits."""
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.4g} GB"


PAGE = """\
<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="color-scheme" content="light dark">
<style>
body {{ font: 14px sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; }}
body {{ color: #24292f; background: white; }}
table {{ border-collapse: collapse; margin: 1em 0; }}
th, td {{ border-bottom: 1px solid #d0d7de; padding: 3px 10px; text-align: left; vertical-align: top; }}
pre {{ background: #f6f8fa; padding: 6px 10px; margin: 4px 0; white-space: pre-wrap; overflow-wrap: anywhere; }}
svg {{ display: block; max-width: 100%; height: auto; }}
details {{ margin: 4px 0; }}
.ground {{ fill: none; }}
@media (prefers-color-scheme: dark) {{
body {{ color: #e6edf3; background: #0d1117; }}
th, td {{ border-color: #30363d; }}
pre {{ background: #161b22; }}
.c0 {{ fill: #4493f8; }} .c1 {{ fill: #d29922; }} .c2 {{ fill: #f85149; }}
.c3 {{ fill: #ab7df8; }} .c4 {{ fill: #3fb950; }} .c5 {{ fill: #9198a1; }} .line {{ stroke: #4493f8; }}
}}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""
