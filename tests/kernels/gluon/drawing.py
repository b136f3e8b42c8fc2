"""Draws docs/attention-gluon-schedule.svg from a run of the forward kernel: `python tests/kernels/gluon/drawing.py`.

The emulator runs one program of the kernel and notes when each operation begins and ends, by assumed costs
(emulator/trace.py): no clock was measured.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[3]
if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")
    sys.path[:0] = [str(ROOT), str(ROOT / "tests/kernels/gluon")]

import emulator  # noqa: E402
from emulator.trace import Costs  # noqa: E402
from trials import Trial, prepared  # noqa: E402

SVG = ROOT / "docs/attention-gluon-schedule.svg"
TRIAL = Trial("forward", 768, D=128)  # six tiles of 128 keys for the last 128 queries
LEFT, WIDTH, ROW, GAP = 130, 860, 24, 6  # pixels
COLOURS = {"K": "#0072b2", "V": "#009e73", "Q": "#999999", "QK": "#0072b2", "PV": "#009e73", "softmax": "#e69f00"}
COLOURS |= {"rescale": "#f0c878", "wait": "none"}


class Box(NamedTuple):
    """row: its number; kind: of COLOURS; times in clocks."""

    row: int
    kind: str
    text: str
    start: float
    end: float


ROWS = ("copies of K", "copies of V", "products", "registers", "products", "registers")


def boxes(events: list[emulator.Event]) -> Iterator[Box]:
    """What the first program did, in rows."""
    counts: dict[tuple[int, str], int] = {}
    for event in events:
        consumer = 1 if event.lane.startswith("consume 1") else 0
        kind = ""
        if event.lane == "copies":
            kind = event.of[0].upper()
            row = int(kind == "V")
        elif event.lane.endswith("products"):
            kind = "PV" if event.of == "registers" else "QK"
            row = 2 + 2 * consumer
        elif event.lane.startswith("consume"):
            kind = {"exponentials": "softmax", "arithmetic": "rescale", "wait": "wait"}[event.kind]
            row = 3 + 2 * consumer
        if kind and kind != "Q" and event.end - event.start > 40:
            number = counts[row, kind] = counts.get((row, kind), -1) + 1
            text = f"{kind} {number}" if kind not in ("rescale", "wait") else ""
            yield Box(row, kind, text, event.start, event.end)


def drawn() -> str:
    """The picture as SVG."""
    trial = prepared(TRIAL)
    report = emulator.run(trial.launch, None)
    assert not report.findings, report
    found = [*boxes([event for event in report.trace if event.cta == 0])]
    end = max(box.end for box in found)
    scale = WIDTH / end
    lines = []
    top = [40 + row * (ROW + GAP) + 16 * (row > 1) + 16 * (row > 3) for row in range(len(ROWS))]
    for name, y in (("producer", top[0]), ("consumer 0", top[2]), ("consumer 1", top[4])):
        lines.append(label(8, y + ROW + GAP / 2 + 4, name, "bold"))
    for name, y in zip(ROWS, top, strict=True):
        lines.append(label(LEFT - 8, y + 16, name, anchor="end", size=10))
        lines.append(f'<rect x="{LEFT}" y="{y}" width="{WIDTH}" height="{ROW}" fill="#f4f4f4"/>')
    bottom = top[-1] + ROW
    for clocks in range(0, int(end) + 1, 2000):
        x = LEFT + clocks * scale
        lines.append(f'<line x1="{x:.1f}" y1="34" x2="{x:.1f}" y2="{bottom}" stroke="#ccc"/>')
        lines.append(label(x, bottom + 14, f"{clocks:,}", anchor="middle", size=10))
    for box in found:
        x, width, y = LEFT + box.start * scale, (box.end - box.start) * scale, top[box.row]
        style = 'fill="none" stroke="#999" stroke-dasharray="2 2"' if box.kind == "wait" else ""
        style = style or f'fill="{COLOURS[box.kind]}" stroke="white"'
        lines.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{ROW}" {style}/>')
        if width > 5.5 * len(box.text) > 0:
            lines.append(label(x + width / 2, y + 16, box.text, anchor="middle", colour="white", size=10))
    return page(lines, bottom)


def label(
    x: float, y: float, text: str, weight: str = "normal", anchor: str = "start", colour: str = "#222", size: int = 12
) -> str:
    look = f'font-weight="{weight}" text-anchor="{anchor}" fill="{colour}" font-size="{size}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {look}>{escape(text)}</text>'


def page(lines: list[str], bottom: float) -> str:
    """The whole picture, with its title and what its times are."""
    costs = Costs()
    notes = [
        "Clocks of assumed costs, not measured: products at "
        f"{costs.flop:,} operations a clock, {costs.exponentials} exponentials and {costs.lanes} other operations a "
        f"clock, copies {costs.latency:.0f} clocks late",
        f"and {costs.bandwidth} bytes a clock; registers as if the other consumer were idle. "
        "Dashed: waits. Light: sums rescaled, P rounded. "
        f"D = {TRIAL.D}, the last 128 of {TRIAL.T} queries. Tile 0 of 128 keys lies on the diagonal.",
    ]
    head = label(8, 20, "One program of the forward kernel: a producer and two consumers", "bold", size=14)
    foot = [label(8, bottom + 36 + 16 * i, note, size=11) for i, note in enumerate(notes)]
    size = f'viewBox="0 0 {LEFT + WIDTH + 20} {bottom + 62:.0f}" width="{LEFT + WIDTH + 20}"'
    style = 'style="background:white" font-family="sans-serif"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>', head, *lines, *foot, "</svg>"]) + "\n"


if __name__ == "__main__":
    SVG.write_text(drawn(), encoding="utf-8")
    print(f"{SVG.relative_to(ROOT)}: {SVG.stat().st_size // 1000} kB")
