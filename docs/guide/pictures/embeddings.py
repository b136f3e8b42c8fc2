"""Chapter 2: a map of the trained token embeddings, and what rotary positions do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from numpy.typing import NDArray
from torch import Tensor

from docs.guide.pictures.frame import FIRST, ROOT, blank
from kernels.rope import frequencies_of, rope_reference
from llm.data.tokenizer import Tokenizer
from llm.trained import load_trained

RUNS = (FIRST,)
GROUPS = {
    "capitals": "#d55e00",
    "a word's beginning, with its space": "#0072b2",
    "letters without a space": "#009e73",
    "signs, digits, spaces": "#999999",
}
FREQUENT = 1000  # times in the training text, from which a token is on the map
LABELS, LONGEST = 20, 7  # of each group; characters of a label
PAIRS, HANDS = (0, 2, 4), 8  # pairs of channels that are drawn, positions of each
D, THETA = 32, 10000.0
Points = NDArray[np.float64]


def draw(runs: dict[str, Path]) -> dict[str, Figure]:
    trained = load_trained(runs[FIRST.name], "cpu")
    weight = trained.model.get_parameter("embedding.weight").detach()
    return {"embeddings": table(weight, trained.tokenizer), "embeddings-rope": rope()}


def table(weight: Tensor, tokenizer: Tokenizer) -> Figure:
    """The first principal component beside the tokens' frequency, and the second and third as a map."""
    tokens = np.fromfile(ROOT / f"data/stdlib-{len(weight)}/train.bin", np.uint16)
    count = np.bincount(tokens, minlength=len(weight))
    centred = (weight - weight.mean(0)).double()
    axes_of = torch.linalg.svd(centred, full_matrices=False)[2]
    places = (centred @ axes_of.T).numpy()
    figure = blank(8, 5)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.9))
    dots(left, np.stack([np.log10(count + 1), places[:, 0]], axis=1)[::4], "#333333")
    left.set_xticks(range(0, 6, 1), ["0", "10", "100", "1k", "10k", "100k"])
    left.set(xlabel="times in the training text", ylabel="place along component 1")
    names = [tokenizer.decode([i]) for i in range(len(weight))]
    groups = np.array([group_of(name) for name in names])
    spread = np.ptp(places[:, 1:3], axis=0)
    taken: list[Points] = []
    for group, colour in GROUPS.items():
        shown = np.flatnonzero((groups == group) & (count >= FREQUENT))
        dots(right, places[shown, 1:3], colour, group)
        room = len(taken) + LABELS
        for i in shown[np.argsort(-count[shown])]:
            apart = [np.abs((places[i, 1:3] - other) / spread) for other in taken]
            if len(names[i]) <= LONGEST and len(taken) < room and all(dx > 0.11 or dy > 0.036 for dx, dy in apart):
                taken.append(places[i, 1:3])
                text = names[i].replace(" ", "·").replace("\n", "↵")
                right.annotate(text, places[i, 1:3], (2, 2), textcoords="offset points", fontsize=9, color=colour)
    right.set(xlabel="place along component 2", ylabel="place along component 3")
    figure.legend(loc="outside upper right", ncols=2, fontsize=9, frameon=False)
    print(f"  component 1 and log count: r = {np.corrcoef(places[:, 0], np.log(count + 1))[0, 1]:.3f}")
    return figure


def group_of(name: str) -> str:
    """The one of GROUPS that a token belongs to, by its spelling alone."""
    letters = name.removeprefix(" ")
    if not letters.isalpha():
        return "signs, digits, spaces"
    if letters.isupper():
        return "capitals"
    return "a word's beginning, with its space" if name.startswith(" ") else "letters without a space"


def dots(axes: Axes, places: Points, colour: str, label: str | None = None) -> None:
    """All of them as one path of lines without length, a third of the file that markers would take."""
    path = Outline(np.repeat(places, 2, axis=0), [Outline.MOVETO, Outline.LINETO] * len(places))
    path.should_simplify = False
    axes.add_patch(PathPatch(path, fill=False, capstyle="round", linewidth=3.5, edgecolor=colour, alpha=0.6))
    axes.plot([], [], "o", color=colour, label=label)
    axes.autoscale_view()


def rope() -> Figure:
    """Three pairs of channels as hands of clocks at the first positions, and the dot product by distance."""
    figure = blank(8, 3.2)
    *clocks, score = figure.subplots(1, 4, width_ratios=(1, 1, 1, 2))
    frequencies = frequencies_of(D, THETA, torch.device("cpu")).tolist()
    for axes, pair in zip(clocks, PAIRS, strict=True):
        axes.set(xlim=(-1.35, 1.35), ylim=(-1.35, 1.35), aspect="equal")
        axes.axis("off")
        axes.set_title(f"pair {pair}: {np.degrees(frequencies[pair]):.1f}°\nper position", fontsize=10)
        for position in range(HANDS):
            x, y = np.cos(position * frequencies[pair]), np.sin(position * frequencies[pair])
            axes.plot([0, x], [0, y], color="#0072b2", alpha=1 - 0.1 * position)
            if frequencies[pair] > 0.2 or position in (0, HANDS - 1):
                axes.text(1.18 * x, 1.18 * y, str(position), fontsize=9, ha="center", va="center")
    distance = torch.arange(128)
    one = torch.ones(1, len(distance), D) / D**0.5
    turned = rope_reference(one[:, :, None], distance, theta=THETA)[0, :, 0]
    score.plot(distance, turned @ turned[0], color="#d55e00")
    score.set(xlabel="distance between two positions", ylabel="dot product", xlim=(0, 127))
    score.grid(alpha=0.3)
    return figure
