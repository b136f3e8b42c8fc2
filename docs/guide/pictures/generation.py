"""Pictures of chapter 12: the next token's distribution at three temperatures, and texts that settings give."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from docs.guide.pictures.frame import FIRST, blank
from llm.generate import hidden, stream
from llm.sampling import SamplingConfig
from llm.trained import Trained, load_trained

RUNS = (FIRST,)
PROMPT = "for i in range("
BEGINNING = "def read(self"
TEMPERATURES = {0.5: "#0072b2", 1.0: "#e69f00", 2.0: "#999999"}
SETTINGS = {
    "temperature 0": SamplingConfig(temperature=0),
    "temperature 1": SamplingConfig(),
    "temperature 0.7, top-p 0.9": SamplingConfig(temperature=0.7, top_p=0.9),
    "temperature 0, repetition penalty 1.3": SamplingConfig(temperature=0, repetition_penalty=1.3),
}
TOKENS, TOP, COLUMNS, ROWS = 72, 12, 46, 13


def draw(runs: dict[str, Path]) -> dict[str, Figure]:
    """`temperature` and `samples`."""
    trained = load_trained(runs[FIRST.name])
    return {"temperature": _temperature(trained), "samples": _samples(trained)}


@torch.inference_mode()
def _temperature(trained: Trained) -> Figure:
    ids = trained.tokenizer.encode(PROMPT)
    logits = trained.model.head(hidden(trained.model, torch.tensor([ids]), 0, None)[0, -1])
    likeliest = logits.topk(TOP).indices
    figure = blank(8, 3.8)
    axes = figure.add_subplot(xlabel=f"next token after {PROMPT.strip()!r}", ylabel="probability (%)")
    for number, (temperature, colour) in enumerate(TEMPERATURES.items()):
        probabilities = (logits / temperature).softmax(-1)[likeliest] * 100
        label = f"temperature {temperature:g}: {probabilities.sum():.0f} % on these {TOP}"
        axes.bar(np.arange(TOP) + (number - 1) * 0.27, probabilities.tolist(), 0.27, color=colour, label=label)
    axes.set_xticks(range(TOP), [repr(trained.tokenizer.decode([i])) for i in likeliest.tolist()], rotation=35)
    for label in axes.get_xticklabels():
        label.set(family="monospace", parse_math=False)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _samples(trained: Trained) -> Figure:
    figure = blank(8, 5)
    for axes, (name, sampling) in zip(figure.subplots(2, 2).flat, SETTINGS.items(), strict=True):
        text = "".join(stream(trained, [BEGINNING], TOKENS, sampling))
        lines = [
            part for line in text.splitlines() for part in textwrap.wrap(line, COLUMNS, drop_whitespace=False) or [""]
        ]
        axes.set_title(name, fontsize=10, loc="left")
        shown = "\n".join(lines[:ROWS]).replace(" ", "\u00a0")  # SVG joins spaces
        axes.text(0.02, 0.96, shown, family="monospace", fontsize=9, va="top", parse_math=False)
        axes.set(xticks=[], yticks=[])
    return figure


def wrapped(line: str) -> list[str]:
    """A line of code in rows of at most COLUMNS."""
    return textwrap.wrap(line, COLUMNS, drop_whitespace=False) or [""]
