"""Reports on a finished run: its loss curve, its validation loss beside a bigram model's, and a sample of text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from llm.checkpoint.writer import checkpoints, step_of
from llm.config.parse import parse_config
from llm.data.tokens.folder import load_manifest
from llm.errors import require
from llm.files import complete_file, json_lines
from llm.generate import stream
from llm.sampling import SamplingConfig
from llm.sinks import Say, Sink
from llm.trained import load_trained


def report(run: Path, say: Say = print) -> None:
    """Draw loss.png of a run and say how far it is, its losses and a sample of its text.

    What cannot be had is left out with a warning. Raises InputError where `run` is not a run's folder.
    """
    metrics, picture = run / "metrics.jsonl", run / "loss.png"
    require(metrics.is_file(), f"{run} is not a run's folder; expected runs/<name>")
    config = parse_config([f"--config={run / 'config.yaml'}"])
    step = max(map(step_of, checkpoints(run / "checkpoints")), default=0)
    tokens_are_files = config.finetune.task in ("none", "continue")
    manifest = Sink("what is known of the data", say)(lambda: load_manifest(config)) if tokens_are_files else None
    bigram = manifest and manifest.bigram_nats_per_token
    drawn = Sink(str(picture), say)(lambda: plot_loss(metrics, picture, config.name, bigram))
    say(f"run {config.name}: {step} of {config.train.max_steps} steps" + (f", {drawn}" if drawn else ""))
    _, losses = series(read_metrics(metrics), "val_loss")
    loss = losses[-1] if losses else None
    for name, nats in (("validation loss", loss), ("bigram model", bigram)):
        if nats is not None:
            bits = manifest and manifest.bits_per_byte(nats)
            in_bits = "" if bits is None else f", {bits:.4f} bits per byte"
            say(f"  {name:16}  {nats:.4f} nats per token{in_bits}")
    if bigram is not None and loss is not None:
        side = "under" if loss < bigram else "above"
        say(f"  the model is {abs(1 - loss / bigram):.1%} {side} the interpolated bigram model")
    prompt, tokens = config.logging.sample_prompt, config.logging.sample_tokens

    def sample() -> str:
        trained, sampling = load_trained(run, torch.device("cpu")), SamplingConfig(1, 0.7, top_p=0.95, seed=config.seed)
        return "\n" + "".join(stream(trained, [prompt], tokens, sampling))

    if tokens > 0 and (text := Sink("the sample of text", say)(sample)):
        say(text)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, without a line that a full disk cut short or that is no record of a step."""
    return [record for _, record in json_lines(path) if record is not None and type(record.get("step")) is int]


def plot_loss(metrics_path: Path, out_path: Path, title: str, bigram: float | None = None) -> Path:
    """Write a PNG with the training loss (as logged, and smoothed), the validation losses and a line for `bigram`.

    All are in nats per token. Returns `out_path`. Raises InputError if metrics.jsonl holds no finite loss.
    """
    from matplotlib.figure import Figure  # only here: without it a run misses its picture, no more

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
    with complete_file(out_path) as file:
        figure.savefig(file, format="png")
    return out_path


def series(records: Iterable[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the records whose `key` is a number."""
    found = [(r["step"], r[key]) for r in records if isinstance(r.get(key), (int, float))]
    return [step for step, _ in found], [value for _, value in found]


def smoothed(values: list[float], most: int = 20) -> list[float]:
    """Means of the values around each, as many before it as after it, so that the curve lags behind no trend.

    At most `most` on each side, and a twentieth of all; towards both ends fewer.
    """
    last, widest = len(values) - 1, min(most, len(values) // 20)
    sides = [min(i, last - i, widest) for i in range(len(values))]
    return [fmean(values[i - side : i + side + 1]) for i, side in enumerate(sides)]
