"""Chapter 3: what a head of the trained model looks at, beside the causal mask."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import cast

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from docs.guide.pictures.frame import FIRST, blank
from kernels.attention.reference import visible
from llm.model.gpt import GPT, Block
from llm.trained import load_trained

RUNS = (FIRST,)
CODE = "self.width = width\nself.height = height\n"


def draw(runs: dict[str, Path]) -> dict[str, Figure]:
    trained = load_trained(runs[FIRST.name], "cpu")
    tokens = trained.tokenizer.encode(CODE)
    weights = weights_of(cast(GPT, trained.model), tokens)
    names = [trained.tokenizer.decode([i]).replace(" ", "·").replace("\n", "↵") for i in tokens]
    looks_back = torch.tensor([[follows(names, t, s) for s in range(len(names))] for t in range(len(names))])
    layer, head = divmod(int((weights * looks_back).sum((2, 3)).argmax()), weights.shape[1])
    print(f"  block {layer}, head {head} looks most at what followed earlier copies of a token")
    mask = visible(1, len(tokens), len(tokens), None, None, None, torch.device("cpu"))[0]
    figure = blank(8, 4.2)
    for axes, shown in zip(figure.subplots(1, 2), (mask.float(), weights[layer, head]), strict=True):
        image = axes.imshow(shown, cmap="Blues", vmin=0, vmax=1, interpolation="none")
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=9, family="monospace")
        axes.set_yticks(range(len(names)), names, fontsize=9, family="monospace")
        axes.tick_params(length=0)
        axes.set_xlabel("looked at (key)")
    figure.axes[0].set_ylabel("looks (query)")
    for t, s in looks_back.nonzero().tolist():
        outline = {"fill": False, "edgecolor": "#d55e00", "linewidth": 1.2}
        figure.axes[1].add_patch(Rectangle((s - 0.5, t - 0.5), 1, 1, **outline))
    figure.colorbar(image, ax=figure.axes, shrink=0.6, label="weight")
    return {"attention": figure}


def follows(names: list[str], t: int, s: int) -> bool:
    """Whether position s comes just after an earlier copy of the token at t, with a space or without."""
    return 0 < s <= t and names[s - 1].strip("·") == names[t].strip("·")


@torch.no_grad()
def weights_of(model: GPT, tokens: list[int]) -> Tensor:
    """The attention weights of each block and head, fp32 [blocks, heads, T, T]: what `core_attention` never keeps."""
    ids, positions, samples = torch.tensor([tokens]), torch.arange(len(tokens)), torch.zeros(1, dtype=torch.int64)
    x, found = model.embedding(ids), []
    for block in cast(Iterable[Block], model.blocks.values()):
        q, k, _ = block.heads(block.qkv(block.norm_1(x)), positions)
        scores = torch.einsum("thd,shd->hts", q[0], k[0]) / q.shape[-1] ** 0.5
        future = torch.ones(len(tokens), len(tokens), dtype=torch.bool).triu(1)
        found.append(scores.masked_fill(future, -torch.inf).softmax(-1))
        x = block(x, positions, samples, None)
    return torch.stack(found)
