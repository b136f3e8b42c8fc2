"""Chapter 5: activations and gradients through 24 untrained blocks, and the stream of the first run's model."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from docs.guide.pictures.frame import FIRST, blank
from docs.guide.pictures.heads import blocks_of, sample
from llm.config import ModelConfig
from llm.model.gpt import GPT, Block
from llm.model.layers import DenseLayers
from llm.trained import Trained, load_trained

RUNS = (FIRST,)
DEPTH = 24
DEEP = ModelConfig(
    n_layer=DEPTH, n_head=4, d_model=128, norm="rmsnorm", activation="swiglu", position="rope", bias=False
)
STARTS = (0.05, 0.15)
"""Standard deviations of initial weights. For a matrix product 0.05 at width 128 is what GPT-2's 0.02 is at 768."""


class Kind(NamedTuple):
    """How the blocks of a deep model are put together, and how its curve looks."""

    name: str
    residual: bool
    norm: bool
    scaled: bool
    style: str


KINDS = (
    Kind("bare", False, False, False, "C7:"),
    Kind("norm", False, True, False, "C1--"),
    Kind("residual", True, False, False, "C3-."),
    Kind("residual + norm", True, True, False, "C0-"),
    Kind("residual + norm + scaled start", True, True, True, "k-"),
)


def draw(runs: dict[str, Path]) -> dict[str, Figure]:
    return {"residuals": untrained(), "residuals-trained": stream(load_trained(runs[FIRST.name]))}


def passed(block: Block, x: Tensor, kind: Kind) -> Tensor:
    """The output of a block that is put together as `kind` says, for x [B, T, C]."""
    positions, numbers = torch.arange(x.shape[1]), torch.arange(len(x))
    scale = 1 if kind.scaled else math.sqrt(2 * DEPTH)  # GPT's own initial weights are the scaled ones

    def normed(x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=1e-5) if kind.norm else x

    heads = block.core_attention(block.qkv(normed(x)), positions, numbers, None)
    x = scale * block.attention_output(heads) + (x if kind.residual else 0)
    up = block.activation(block.up(normed(x)), impl=block.forms.activation)
    return scale * block.down(up) + (x if kind.residual else 0)


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def through(model: GPT, kind: Kind) -> tuple[list[float], list[float]]:
    """RMS of the activations before each block and after the last, and of the gradient of a random sum of the last."""
    draw = torch.Generator().manual_seed(1)
    states = [model.embedding(torch.randint(model.config.vocab_size, (2, 32), generator=draw)).detach()]
    states[0].requires_grad_()
    for block in model.blocks.values():
        states.append(passed(cast(Block, block), states[-1], kind))
    gradients = torch.autograd.grad(states[-1], states, torch.randn(states[-1].shape, generator=draw))
    return [rms(x) for x in states], [rms(g) for g in gradients]


def untrained() -> Figure:
    small, large = (GPT(replace(DEEP, init_std=std), DenseLayers(seed=1)) for std in STARTS)
    figure = blank(9, 4)
    grid = figure.subplots(1, 3, sharey=True)
    for kind in KINDS:
        activations, gradients = through(small, kind)
        for axes, values in zip(grid, (activations, through(large, kind)[0], gradients), strict=True):
            axes.plot(values, kind.style, label=kind.name)
    names = (*(f"RMS of activations, weights of {std}" for std in STARTS), f"RMS of gradients, weights of {STARTS[0]}")
    for axes, name in zip(grid, names, strict=True):
        axes.set_title(name, fontsize=10)
        axes.set(yscale="log", xlabel="blocks passed", ylim=(1e-6, 1e6))
        axes.grid(alpha=0.3)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


@torch.no_grad()
def stream(trained: Trained) -> Figure:
    tokens = sample(trained)[:, :-1]
    x, positions = cast(GPT, trained.model).embedding(tokens), torch.arange(tokens.shape[1])
    sizes, names, added = [rms(x)], ["embedding"], [rms(x)]
    for number, block in enumerate(blocks_of(trained), 1):
        attended = block.attention_output(
            block.core_attention(block.qkv(block.norm_1(x)), positions, torch.arange(len(x)), None)
        )
        after = block(x, positions, torch.arange(len(x)), None)
        added += [rms(attended), rms(after - x - attended)]
        sizes += [rms(x + attended), rms(after)]
        names += [f"attention {number}", f"feed-forward {number}"]
        x = after
    figure = blank(7, 3.8)
    axes = figure.add_subplot()
    axes.bar(range(len(names)), added, color="C0", label="what this part adds")
    axes.plot(sizes, "ko-", label="the stream after it")
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right")
    axes.set_ylabel("RMS")
    axes.legend()
    return figure
