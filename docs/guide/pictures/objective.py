"""Chapter 6: the losses of the first run and of the LSTM as they train, beside those of models that only count."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from docs.guide.pictures.frame import FIRST, LSTM, blank
from llm.config.parse import parse_config
from llm.data.tokens.folder import data_folder, load_manifest
from llm.report import read_metrics, series, smoothed

RUNS = (FIRST, LSTM)
MODELS = ((LSTM, "LSTM", "C1", "s"), (FIRST, "GPT", "C0", "o"))


def draw(runs: dict[str, Path]) -> dict[str, Figure]:
    config = parse_config([f"--config={runs[FIRST.name] / 'config.yaml'}"])
    V, folder = config.model.vocab_size, data_folder(config)
    counts = np.bincount(np.fromfile(folder / "train.bin", dtype=np.uint16), minlength=V) + 1
    shares = np.log(counts / counts.sum())
    unigram = -shares[np.fromfile(folder / "validation.bin", dtype=np.uint16)].mean()
    figure = blank(8, 4.6)
    axes = figure.add_subplot()
    for run, name, colour, marker in MODELS:
        records = read_metrics(runs[run.name] / "metrics.jsonl")
        steps, losses = series(records, "loss")
        axes.plot(
            steps[::5], smoothed(losses)[::5], color=colour, linewidth=1, alpha=0.6, label=f"{name}, training text"
        )
        steps, losses = series(records, "val_loss")
        axes.plot(
            steps, losses, f"{marker}--", color=colour, label=f"{name}, validation text: {losses[-1]:.2f} at the end"
        )
    lines = [(math.log(V), "all tokens alike"), (unigram, "single tokens counted")]
    if bigram := load_manifest(config).bigram_nats_per_token:
        lines.append((bigram, "pairs of tokens counted (bigram)"))
    for height, name in lines:
        axes.axhline(height, color="gray", linestyle=":")
        axes.annotate(f"{name}: {height:.2f}", (1, height), (-4, 3), xycoords=axes.get_yaxis_transform(),
                      textcoords="offset points", ha="right", fontsize=9)  # fmt: skip
    axes.set(xlabel=f"steps, of {config.train.global_batch_size * config.data.seq_len:,} tokens each",
             ylabel="loss (nats per token)", ylim=(2, 7.3))  # fmt: skip
    perplexity = axes.secondary_yaxis("right", functions=(np.exp, lambda p: np.log(np.maximum(p, 1e-9))))
    perplexity.set(ylabel="perplexity", yticks=(10, 20, 50, 100, 200, 500, 1000))
    axes.legend(loc="upper center", fontsize=9)
    axes.grid(alpha=0.3)
    return {"objective": figure}
