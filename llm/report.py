"""Reports on a finished run: its loss curve, its validation loss beside a bigram model's, and a sample of text."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from llm.data.tokens.folder import load_manifest
from llm.errors import require
from llm.generate import stream
from llm.sampling import SamplingConfig
from llm.trained import load_trained


def report(run: Path) -> str:
    """Draw loss.png of a run with a checkpoint and describe the run in a few lines."""
    metrics = run / "metrics.jsonl"
    require(metrics.is_file(), f"{run} is not a run's folder; expected runs/<name>")
    trained = load_trained(run, torch.device("cpu"))
    config, manifest = trained.config, load_manifest(trained.config)
    bigram = manifest.bigram_nats_per_token
    plot_loss(metrics, run / "loss.png", config.name, bigram)
    lines = [f"run {config.name}: {trained.step} of {config.train.max_steps} steps, {run / 'loss.png'}"]
    _, losses = series(read_metrics(metrics), "val_loss")
    loss = losses[-1] if losses else None
    for name, nats in (("validation loss", loss), ("bigram model", bigram)):
        if nats is not None:
            bits = manifest.bits_per_byte(nats)
            in_bits = "" if bits is None else f", {bits:.4f} bits per byte"
            lines.append(f"  {name:16}  {nats:.4f} nats per token{in_bits}")
    if bigram is not None and loss is not None:
        side = "under" if loss < bigram else "above"
        lines.append(f"  the model is {abs(1 - loss / bigram):.1%} {side} the interpolated bigram model")
    settings = config.logging
    if settings.sample_tokens > 0:
        sampling = SamplingConfig(temperature=0.7, top_p=0.95, seed=config.seed)
        lines += ["", "".join(stream(trained, [settings.sample_prompt], settings.sample_tokens, sampling))]
    return "\n".join(lines)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def plot_loss(metrics_path: Path, out_path: Path, title: str, bigram: float | None = None) -> None:
    """Write a PNG with the training loss (as logged, and smoothed), the validation losses and a line for `bigram`.

    All are in nats per token. Raises InputError if metrics.jsonl holds no finite loss.
    """
    records = read_metrics(metrics_path)
    steps, losses = series(records, "loss")
    val_steps, val_losses = series(records, "val_loss")
    require(bool(losses or val_losses), f"{metrics_path} holds no loss; expected a line per logged step")
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
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
    """Exponential moving average over about `horizon` values, without bias towards 0 at its start."""
    keep = 1 - 1 / min(horizon, max(1, len(values) // 10))
    average, weight, result = 0.0, 0.0, []
    for value in values:
        average, weight = keep * average + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(average / weight)
    return result
