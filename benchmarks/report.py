"""Stores every benchmark's results as JSON lines, and turns them into Markdown tables and plots.

The first line of the file is the header, {"run": ...}: command, date and machine. Every record after it is a line, so
a run that is stopped keeps what it has measured.
"""

import datetime
import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.clock import machine

Record = dict[str, Any]
NONE = "–"  # noqa: RUF001
PANEL_INCHES = (7, 4.5)
STYLES: dict[str, dict[str, Any]] = {
    "ours": {"linestyle": "-", "linewidth": 2.5},
    "peer": {"linestyle": "--", "linewidth": 1.2},
    "reference": {"linestyle": ":", "linewidth": 1.2},
}


def header(module: str, arguments: Sequence[str], device: torch.device, packages: Sequence[str]) -> Record:
    """What a run was made with and on."""
    command = shlex.join(["python", "-m", module, *arguments])
    date = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return {"command": command, "date": date} | machine(device, packages)


def begin(path: Path, head: Record) -> None:
    """Write a file of no records yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"run": head}) + "\n", encoding="utf-8")


def append(path: Path, record: Record) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read(path: Path) -> tuple[Record, list[Record]]:
    """The header and the records. Raises ValueError or KeyError where the file is damaged."""
    first, *records = map(json.loads, path.read_text(encoding="utf-8").splitlines() or ["{}"])
    return first["run"], records


def heading(head: Record) -> str:
    """The sentence on a run that stands above its tables."""
    packages = [f"{name} {version}" for name, version in head["packages"].items()]
    hardware = f"{head['cores']} cores of {head['cpu']}, {head['memory_gb']} GB"
    parts = [head["date"][:10], head["gpu"] or hardware, head["system"], f"Python {head['python']}", *packages]
    return f"{', '.join(parts)}, `{head['command']}`. Load average before the run: {head['load']:.1f}."


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    first, *others = ("| " + " | ".join(cells) + " |" for cells in (head, *rows))
    return [first, "|---" * len(head) + "|", *others]


def number(x: float) -> str:
    """Three figures at most, or whole."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def spread(values: Sequence[float], scale: float = 1.0) -> str:
    """Median and quartiles; one value alone; a dash for none."""
    if len(values) < 2:
        return number(values[0] * scale) if values else NONE
    low, middle, high = map(number, np.quantile(values, (0.25, 0.5, 0.75)) * scale)
    return f"{middle} ({low} to {high})"


@dataclass(frozen=True)
class Curve:
    """A line of a panel. A reference is a bound or a measure, such as the rate of a copy."""

    label: str
    points: Sequence[tuple[float, float]]
    role: Literal["ours", "peer", "reference"] = "peer"


@dataclass(frozen=True)
class Panel:
    """One plot. ticks: the places on the x axis that bear a text. log_x, log_y: whether an axis is logarithmic."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    ticks: Sequence[tuple[float, str]]
    log_x: bool = True
    log_y: bool = False


def plot(path: Path, panels: Sequence[Panel], title: str = "") -> None:
    """Write a PNG of panels, two in a row."""
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    width, height = PANEL_INCHES
    figure = Figure(figsize=(width * columns, height * rows), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for place, panel in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, place)
        for curve in panel.curves:
            xs, ys = zip(*curve.points, strict=True)
            axes.plot(xs, ys, marker="o", markersize=3, label=curve.label, **STYLES[curve.role])
        if panel.log_x:
            axes.set_xscale("log", base=2)
        ticks = {"rotation": 0, "ha": "center"} if panel.log_x else {"rotation": 20, "ha": "right"}
        axes.set_xticks([x for x, _ in panel.ticks], [text for _, text in panel.ticks], fontsize=7, **ticks)
        if panel.log_y:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
        axes.grid(alpha=0.3)
        if panel.curves:
            axes.legend(fontsize=7)
    figure.savefig(path, format="png")
