"""Draws the loss curve of a run from its metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from llm.errors import require


def plot_loss(metrics_path: Path, out_path: Path, title: str, bigram: float | None = None) -> None:
    """Write a PNG with the training loss (as logged, and smoothed) and the validation losses.

    Args:
        metrics_path: metrics.jsonl; lines with `loss` are training, with `val_loss` validation.
        bigram: loss of a bigram model, nats per token, drawn as a line; None: no line.

    Raises:
        InputError: the file holds no finite loss.
    """
    records = [json.loads(line) for line in metrics_path.read_text().splitlines() if line.strip()]
    steps, losses = series(records, "loss")
    val_steps, val_losses = series(records, "val_loss")
    require(bool(losses or val_losses), f"{metrics_path} holds no loss; expected a line per logged step")
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if losses:
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(steps, smoothed(losses), color="tab:blue", label="training, smoothed")
    if val_losses:
        last = f"validation, last {val_losses[-1]:.3f}"
        axes.plot(val_steps, val_losses, color="tab:red", marker="o", markersize=4, label=last)
    if bigram is not None:
        axes.axhline(bigram, color="gray", linestyle="--", label=f"bigram model, {bigram:.3f}")
    axes.set(title=title, xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out_path, format="png")


def series(records: Iterable[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the records whose `key` is a number."""
    found = [(r["step"], r[key]) for r in records if isinstance(r.get(key), (int, float))]
    return [step for step, _ in found], [value for _, value in found]


def smoothed(values: list[float], horizon: int = 20) -> list[float]:
    """Exponential moving average over about `horizon` values, without bias at its start."""
    keep = 1 - 1 / min(horizon, max(1, len(values) // 10))
    average, weight, result = 0.0, 0.0, []
    for value in values:
        average, weight = keep * average + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(average / weight)
    return result
