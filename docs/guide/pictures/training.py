"""Chapter 7: short runs without warm-up, clipping, decay or a falling rate, and gradients beside fp16's range."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from docs.guide.pictures.frame import FIRST, Run, blank
from docs.guide.pictures.heads import blocks_of, sample
from llm.config import ModelConfig, OptimConfig
from llm.data.tokens.folder import data_folder
from llm.model.gpt import GPT
from llm.model.layers import DenseLayers
from llm.report import read_metrics, series, smoothed
from llm.train.engines.shared import clip, global_norm
from llm.train.optim import adamw, learning_rate, parameter_groups
from llm.trained import Trained, load_trained

SHORT = (
    *("--train.max_steps=160", "--train.global_batch_size=16", "--train.micro_batch_size=16"),
    *("--train.eval_interval=160", "--checkpoint.interval=160", "--data.validation_samples=128"),
    *("--optim.warmup_steps=20", "--logging.sample_tokens=0", "--logging.tensorboard=false"),
)
"""160 steps of half of the first run's batch: 6 % of its tokens."""


def short(name: str, *settings: str) -> Run:
    return Run(f"guide-training-{name}", settings=(*SHORT, *settings))


BASE = short("base")
BARE = short("hot-bare", "--optim.lr=0.1", "--optim.warmup_steps=0", "--optim.grad_clip=0")
GO_ON = ("--train.max_steps=60", "--train.eval_interval=60", "--checkpoint.interval=60", "--optim.warmup_steps=10")
FALLING = short("go-on-falling", *GO_ON)._replace(after=FIRST.name)
PANELS = {
    "learning rate": {BASE: "0.004", short("hot", "--optim.lr=0.1"): "0.1", BARE: "0.1, unguarded"},
    "warm-up": {BASE: "with", short("no-warmup", "--optim.warmup_steps=0"): "without"},
    "falling rate, new model": {BASE: "with", short("constant", "--optim.min_lr=4e-3"): "without"},
    "falling rate, trained model": {
        FALLING: "with",
        short("go-on-constant", *GO_ON, "--optim.min_lr=4e-3")._replace(after=FIRST.name): "without",
    },
}
RUNS = (FIRST, *dict.fromkeys(run for runs in PANELS.values() for run in runs))
PLANTED, PLANTED_STEPS = 20, 80
SCALE = 2.0**16
"""fp16's first loss scale (llm/train/engines/shared.py)."""
ZERO = 2.0**-25
"""What fp16 rounds to 0: half of its smallest number."""


def draw(runs: dict[str, Path]) -> dict[str, Figure]:
    trained = load_trained(runs[FIRST.name])
    return {"training": short_runs(runs, trained), "training-fp16": histogram(trained)}


def short_runs(runs: dict[str, Path], trained: Trained) -> Figure:
    figure = blank(9, 5.6)
    grid = figure.subplots(2, 3).flatten()

    def curve(axes: Axes, run: Run, style: str, name: str) -> None:
        records = read_metrics(runs[run.name] / "metrics.jsonl")
        steps, losses = series(records, "loss")
        end = series(records, "val_loss")[1][-1]
        axes.plot(steps[::2], smoothed(losses)[::2], style, linewidth=1.4, label=f"{name}: {end:.2f}")

    for axes, (title, lines) in zip(grid, PANELS.items(), strict=False):
        for (run, name), style in zip(lines.items(), ("k-", "C1--", "C0-."), strict=False):
            curve(axes, run, style, name)
        axes.set_title(title, fontsize=10)
    tokens = torch.from_numpy(np.fromfile(data_folder(trained.config) / "train.bin", dtype=np.uint16).astype(np.int64))
    for limit, style, name in ((1.0, "k-", "with"), (0.0, "C1--", "without")):
        losses = planted(tokens, trained.config.model.vocab_size, limit)
        grid[4].plot(losses, style, linewidth=1.4, label=f"{name}: {fmean(losses[-10:]):.2f}")
    grid[4].set_title(f"clipping, a bad gradient in step {PLANTED}", fontsize=10)
    for axes in grid[:5]:
        axes.set_xlabel("steps")
        axes.legend(fontsize=9)
    grid[0].set_ylim(4.8, 11)
    for axes in grid[::3]:
        axes.set_ylabel("loss (nats per token)")
    for schedule, style in (("cosine", "k-"), ("wsd", "C0-.")):
        optim = replace(trained.config.optim, schedule=schedule)
        steps = range(0, trained.config.train.max_steps, 20)
        rates = [learning_rate(optim, step, trained.config.train.max_steps) for step in steps]
        grid[5].plot(steps, rates, style, label=schedule)
    grid[5].set(xlabel="steps of the first run", ylabel="learning rate")
    grid[5].legend(fontsize=9)
    return figure


def gradients(trained: Trained) -> dict[str, Tensor]:
    """Magnitudes of the loss's gradients where the mean is over as many tokens as in a step of the run."""
    model, rows, config = cast(GPT, trained.model), sample(trained)[:16], trained.config
    tokens, targets, numbers = rows[:, :-1], rows[:, 1:], torch.arange(len(rows))
    positions = torch.arange(tokens.shape[1])
    x = model.embedding(tokens)
    stream = [x]
    for block in blocks_of(trained):
        x = block(x, positions, numbers, None)
        stream.append(x)
    logits = F.linear(model.norm(x), model.embedding.weight)
    summed = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    mean = summed / (config.train.global_batch_size * config.data.seq_len)
    parts = {"weights": list(model.parameters()), "residual stream": stream, "logits": [logits]}
    found = torch.autograd.grad(mean, [x for part in parts.values() for x in part])
    sizes = iter(x.abs().double().flatten() for x in found)
    return {name: torch.cat([next(sizes) for _ in part]) for name, part in parts.items()}


def histogram(trained: Trained) -> Figure:
    figure = blank(8, 4)
    axes, bins = figure.add_subplot(), np.arange(-44, 1)
    styles = (("C0", "-"), ("C1", "--"), ("black", ":"))
    for (name, sizes), (colour, style) in zip(gradients(trained).items(), styles, strict=True):
        counts, _ = np.histogram(np.log2(sizes[sizes > 0].numpy()), bins)
        lost, saved = ((sizes * scale).half().eq(0).double().mean().item() for scale in (1, SCALE))
        label = f"{name}: {lost:.0%} become 0, {saved:.0%} if scaled"
        axes.stairs(counts / len(sizes), bins, color=colour, linestyle=style, linewidth=1.6, label=label)
    axes.axvspan(-44, np.log2(ZERO), color="0.87", zorder=0, label="becomes 0 in fp16")
    axes.axvspan(-44, np.log2(ZERO / SCALE), color="0.7", zorder=0, label="becomes 0 even if scaled by 65,536")
    axes.set(xlim=(-44, 0), xlabel="magnitude of a gradient", ylabel="share of the gradients")
    axes.set_xticks(range(-40, 1, 8), [f"2$^{{{power}}}$" if power else "1" for power in range(-40, 1, 8)])
    axes.legend(fontsize=9, loc="upper left")
    return figure


def planted(tokens: Tensor, vocabulary: int, limit: float) -> list[float]:
    """Losses of a small model on pieces of the tokens; one step has a gradient that is 1,000 times too large."""
    shape = ModelConfig(n_layer=2, d_model=64, vocab_size=vocabulary, norm="rmsnorm", activation="swiglu", bias=False)
    model, optim = GPT(shape, DenseLayers(seed=1)), OptimConfig(lr=1e-2, warmup_steps=10)
    optimizer = adamw(parameter_groups(model, optim.weight_decay), optim)
    weights, losses, generator = list(model.parameters()), [], torch.Generator().manual_seed(1)
    for step in range(PLANTED_STEPS):
        starts = torch.randint(len(tokens) - 65, (16, 1), generator=generator)
        batch = tokens[starts + torch.arange(65)]
        loss = model(batch[:, :-1], targets=batch[:, 1:]) / batch[:, 1:].numel()
        losses.append(loss.item())
        (loss * (1000 if step == PLANTED else 1)).backward()
        clip(weights, global_norm(weights, None), limit)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(optim, step, PLANTED_STEPS)
        optimizer.step()
        optimizer.zero_grad()
    return losses
