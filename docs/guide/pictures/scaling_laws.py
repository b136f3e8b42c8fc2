"""Chapter 10: four small models on 20 tokens a parameter, the power law through them, and where tiny-cpu ended."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from docs.guide.pictures.frame import FIRST, ROOT, Run, blank
from llm.config.parse import parse_config
from llm.plan.budget import optimal_tokens
from llm.plan.flops import flops_of_steps
from llm.plan.memory import parameters

SHAPES = ((16, 2, 2), (32, 2, 2), (48, 2, 2), (64, 3, 4))  # d_model, n_layer, n_head
STEP = 32 * 128  # tokens
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"


def run_of(width: int, layers: int, heads: int) -> Run:
    """tiny-cpu at another size, for 20 tokens a parameter; init_std follows the width as that of tiny-cpu does."""
    shape = (f"--model.d_model={width}", f"--model.n_layer={layers}", f"--model.n_head={heads}")
    tiny = parse_config(["--config", str(ROOT / "launch/configs/tiny-cpu.yaml"), *shape])
    steps = round(optimal_tokens(tiny.model) / STEP)
    schedule = (f"--train.max_steps={steps}", f"--optim.warmup_steps={steps // 10}", f"--train.eval_interval={steps}")
    scaled = ("--optim.lr=8e-3", f"--model.init_std={0.15 / width**0.5:.3g}")  # the best rate of three at width 32
    return Run(f"guide-scaling-{width}", settings=(*shape, *schedule, *scaled, "--logging.sample_tokens=0"))


RUNS = (FIRST, *(run_of(*shape) for shape in SHAPES))


def result(folder: Path) -> tuple[int, float, float]:
    """Of a trained run: parameters, FLOPs of its training, and its last validation loss in nats per token."""
    config = parse_config(["--config", str(folder / "config.yaml")])
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    loss = [row["val_loss"] for row in rows if "val_loss" in row][-1]
    return parameters(config.model), flops_of_steps(config, 0, config.train.max_steps), loss


def draw(runs: dict[str, Path]) -> dict[str, Figure]:
    results = {name: result(folder) for name, folder in runs.items()}
    *small, (_, tiny_flops, tiny_loss) = [results[run.name] for run in (*RUNS[1:], FIRST)]
    flops, losses = (np.array([row[i] for row in small]) for i in (1, 2))
    slope, offset = np.polyfit(np.log(flops), np.log(losses), 1)
    figure = blank()
    axes = figure.subplots()
    line = np.geomspace(flops.min() / 2, tiny_flops * 2, 50)
    predicted = np.exp(offset) * tiny_flops**slope
    axes.plot(line, np.exp(offset) * line**slope, color=GREY, ls="--", label=f"fit: loss ∝ compute^{slope:.3f}")
    axes.plot(flops, losses, "o", color=BLUE, ms=8, label="20 tokens per parameter: the fit's points")
    for size, work, loss in small:
        axes.annotate(f"{size:,} parameters\n{loss:.3f}", (work, loss), (8, 6), textcoords="offset points", fontsize=9)
    axes.plot(tiny_flops, predicted, "o", mec=ORANGE, mfc="white", ms=9, label=f"predicted: {predicted:.3f}")
    axes.plot(tiny_flops, tiny_loss, "D", color=ORANGE, ms=8, label=f"tiny-cpu as trained: {tiny_loss:.3f}")
    axes.set(xscale="log", yscale="log", xlabel="FLOPs of the training", ylabel="validation loss (nats per token)")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    ticks = [tick for tick in np.arange(2, 8, 0.5) if min(losses.min(), tiny_loss, predicted) - 0.3 < tick]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_ylim(min(losses.min(), tiny_loss, predicted) * 0.93, losses.max() * 1.1)
    axes.legend(loc="lower left", frameon=False, fontsize=10)
    return {"scaling-laws": figure}
