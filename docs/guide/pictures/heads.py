"""Chapter 4: what the 16 heads of the first run's model look at, and what the loss becomes without each."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from docs.guide.pictures.frame import FIRST, blank
from llm.data.tokens.folder import data_folder
from llm.model.gpt import GPT, Block
from llm.trained import Trained, load_trained

RUNS = (FIRST,)
EVERY = 60
"""Of the validation samples each such one is measured: 21 of them."""
TEXT = "def read(self, path):\n    with open(path) as file:\n        return file.read()\n"


def draw(runs: dict[str, Path]) -> dict[str, Figure]:
    trained = load_trained(runs[FIRST.name])
    return {"heads": maps(trained), "heads-removed": removed(trained)}


def blocks_of(trained: Trained) -> list[Block]:
    return [cast(Block, block) for block in cast(GPT, trained.model).blocks.values()]


@torch.no_grad()
def weights(block: Block, x: Tensor) -> Tensor:
    """The attention weights of a block's heads for its input x [1, T, C]: [H, T, T]."""
    T = x.shape[1]
    q, k, _ = block.heads(block.qkv(block.norm_1(x)), torch.arange(T))
    scores = torch.einsum("bihd,bjhd->hij", q, k) / q.shape[-1] ** 0.5
    return scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(-1)


@torch.no_grad()
def maps(trained: Trained) -> Figure:
    tokens = torch.tensor([trained.tokenizer.encode(TEXT)])
    x, positions = cast(GPT, trained.model).embedding(tokens), torch.arange(tokens.shape[1])
    blocks, heads = blocks_of(trained), trained.config.model.n_head
    figure = blank(7, 7.2)
    grid = figure.subplots(len(blocks), heads, squeeze=False)
    for number, (block, row) in enumerate(zip(blocks, grid, strict=True), 1):
        for head, (axes, map_) in enumerate(zip(row, weights(block, x), strict=True), 1):
            shown = axes.imshow(map_.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_title(f"head {number}.{head}", fontsize=10)
        x = block(x, positions, torch.zeros(1, dtype=torch.long), None)
    figure.supxlabel(f"token that is looked at, 1 to {tokens.shape[1]}", fontsize=10)
    figure.supylabel("token that looks (first at the top)", fontsize=10)
    figure.colorbar(shown, ax=grid, shrink=0.5, aspect=30, label="attention weight")
    return figure


def sample(trained: Trained) -> Tensor:
    """Samples of the validation text, evenly spread: int64 [N, T + 1]."""
    tokens = np.fromfile(data_folder(trained.config) / "validation.bin", dtype=np.uint16).astype(np.int64)
    width = trained.config.data.seq_len + 1
    return torch.from_numpy(tokens[: len(tokens) // width * width].reshape(-1, width)[::EVERY])


@torch.no_grad()
def loss(trained: Trained, rows: Tensor) -> float:
    """Nats per token."""
    return trained.model(rows[:, :-1], targets=rows[:, 1:]).item() / rows[:, 1:].numel()


@torch.no_grad()
def without(trained: Trained, rows: Tensor) -> tuple[float, list[list[float]]]:
    """The loss, and by block and head how much higher it is without that head; last in a block, without all of them."""
    whole, rises = loss(trained, rows), []
    for block in blocks_of(trained):
        weight, D = cast(Tensor, block.attention_output.weight), trained.config.model.head_dim
        kept, row = weight.clone(), []
        for columns in (*(slice(i, i + D) for i in range(0, weight.shape[1], D)), slice(None)):
            weight[:, columns] = 0
            row.append(loss(trained, rows) - whole)
            weight.copy_(kept)
        rises.append(row)
    return whole, rises


def removed(trained: Trained) -> Figure:
    whole, rises = without(trained, sample(trained))
    figure = blank(7, 3.6)
    axes = figure.add_subplot()
    values = np.array(rises)
    shown = axes.imshow(values, cmap="Blues", vmin=0, vmax=max(values.max(), 0.01), aspect="auto")
    for (row, column), rise in np.ndenumerate(values):
        colour = "white" if rise > values.max() / 2 else "black"
        axes.text(column, row, f"{rise:+.2f}", ha="center", va="center", color=colour, fontsize=11)
    heads = values.shape[1] - 1
    axes.set_xticks(range(heads + 1), [*(f"head {i + 1}" for i in range(heads)), "all heads"])
    axes.set_yticks(range(len(values)), [f"block {i + 1}" for i in range(len(values))])
    figure.colorbar(shown, label=f"rise of the loss above {whole:.2f}\n(nats per token)")
    return figure
